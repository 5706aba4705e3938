//! The socket hooks: each turns its context into a call, asks [`xdp_common::decide::socket`], and applies the outcome.
//!
//! They run in the context of the calling process, once a connection, or once a datagram where a UDP socket names an
//! address with each. Those of IPv6 meet IPv4 addresses too, mapped; what is not mapped goes to the tables of IPv6.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use xdp_common::{
    decide::socket::{self, Answer, Call, EADDRINUSE, Outcome, Sockets, errno},
    net::{Address, Family, TCP, UDP, V4},
    tables::SocketCall,
    verdict::Reason,
};

use crate::{
    maps::Kernel,
    socket::{Socket, count},
};

/// What a hook returns to let a call go on, or to end it.
const GO_ON: i32 = 1;
const END: i32 = 0;

type AddrV4 = [u8; 4];

/// An IPv4 socket connects.
#[cgroup_sock_addr(connect4)]
pub(crate) fn socket_connect4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    connect::<V4>(socket, socket.address_v4(), socket.source_v4(), Socket::set_address_v4)
}

/// An IPv6 socket connects.
#[cgroup_sock_addr(connect6)]
pub(crate) fn socket_connect6(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    let Some(addr) = mapped(socket) else { return GO_ON };
    connect::<V4>(socket, addr, socket.source_v4(), set_mapped)
}

/// A UDP socket, of either family, sends to an IPv4 address that it names.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn socket_sendmsg4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    let call = call::<V4>(socket, socket.address_v4(), socket.source_v4());
    let outcome = socket::send::<V4, _>(kernel(socket), &call);
    settle(socket, SocketCall::UdpSend, &outcome, Socket::set_address_v4)
}

/// An IPv4 socket is told where a datagram has come from.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn socket_recvmsg4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    tell::<V4>(socket, socket.address_v4(), Socket::set_address_v4)
}

/// An IPv6 socket is told where a datagram has come from.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn socket_recvmsg6(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    let Some(addr) = mapped(socket) else { return GO_ON };
    tell::<V4>(socket, addr, set_mapped)
}

/// A process asks an IPv4 socket for its peer.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn socket_getpeername4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    tell::<V4>(socket, socket.address_v4(), Socket::set_address_v4)
}

/// A process asks an IPv6 socket for its peer.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn socket_getpeername6(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    let Some(addr) = mapped(socket) else { return GO_ON };
    tell::<V4>(socket, addr, set_mapped)
}

/// A process binds an IPv4 socket.
#[cgroup_sock_addr(bind4)]
pub(crate) fn socket_bind4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    bind::<V4>(socket, socket.address_v4())
}

/// A process binds an IPv6 socket, which without an address takes clients of IPv4 too.
#[cgroup_sock_addr(bind6)]
pub(crate) fn socket_bind6(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    let is_any = socket.address_v6() == <[u8; 16]>::UNSPECIFIED;
    let addr = if is_any { Some(AddrV4::UNSPECIFIED) } else { mapped(socket) };
    let Some(addr) = addr else { return GO_ON };
    bind::<V4>(socket, addr)
}

#[inline(always)] // the context must stay the context
fn connect<F: Family>(socket: Socket, addr: F::Addr, source: F::Addr, set: impl Fn(Socket, F::Addr)) -> i32
where
    Kernel: Sockets<F>,
{
    let kind = match socket.proto() {
        TCP => SocketCall::TcpConnect,
        UDP => SocketCall::UdpConnect,
        _ => return GO_ON,
    };
    let outcome = socket::connect::<F, _>(kernel(socket), &call::<F>(socket, addr, source));
    settle(socket, kind, &outcome, set)
}

#[inline(always)]
fn tell<F: Family>(socket: Socket, addr: F::Addr, set: impl Fn(Socket, F::Addr)) -> i32
where
    Kernel: Sockets<F>,
{
    let told = socket::told::<F, _>(kernel(socket), socket.proto(), socket.cookie(), addr, socket.port());
    if let Some((addr, port)) = told {
        set(socket, addr);
        socket.set_port(port);
    }
    GO_ON
}

#[inline(always)]
fn bind<F: Family>(socket: Socket, addr: F::Addr) -> i32
where
    Kernel: Sockets<F>,
{
    let port = socket.port();
    if port == [0; 2] || !socket.is_host() {
        return GO_ON;
    }
    if socket::may_bind::<F, _>(kernel(socket), addr, port, socket.proto()) {
        return GO_ON;
    }
    count(SocketCall::Bind.counter(None));
    Socket::fail(EADDRINUSE);
    END
}

#[inline(always)]
fn call<F: Family>(socket: Socket, addr: F::Addr, source: F::Addr) -> Call<F::Addr> {
    Call {
        addr,
        port: socket.port(),
        proto: socket.proto(),
        source,
        namespace: socket.namespace(),
        is_host: socket.is_host(),
        cookie: socket.cookie(),
        random: Socket::random(),
    }
}

#[inline(always)]
fn settle<A: Address>(socket: Socket, kind: SocketCall, outcome: &Outcome<A>, set: impl Fn(Socket, A)) -> i32 {
    let refused: Option<Reason> = match outcome.answer {
        Answer::Left => return GO_ON,
        Answer::Translated => None,
        Answer::Refused(reason) => Some(reason),
    };
    count(kind.counter(refused));
    let Some(reason) = refused else {
        set(socket, outcome.addr);
        socket.set_port(outcome.port);
        return GO_ON;
    };
    Socket::fail(errno(reason));
    END
}

/// The IPv4 address that an IPv6 address maps.
#[inline(always)]
fn mapped(socket: Socket) -> Option<AddrV4> {
    let wide = socket.address_v6();
    let addr = AddrV4::from_wide(wide);
    if addr.wide() == wide { Some(addr) } else { None }
}

#[inline(always)]
fn set_mapped(socket: Socket, addr: AddrV4) {
    socket.set_address_v6(addr.wide());
}

#[inline(always)]
fn kernel(socket: Socket) -> Kernel {
    Kernel { ctx: socket.context() }
}
