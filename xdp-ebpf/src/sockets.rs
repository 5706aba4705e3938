//! The socket hooks: each turns its context into a call, asks [`xdp_common::decide::socket`], and applies the outcome.
//!
//! They run in the context of the calling process, once a connection, or once a datagram where a UDP socket names an
//! address with each. Those of IPv6 meet IPv4 addresses too, mapped.

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SockAddrContext, SockContext},
};
use xdp_common::{
    decide::socket::{self, Answer, Call, EADDRINUSE, Outcome, errno},
    net::{Address, Ip6, TCP, UDP, V4, V6},
    tables::SocketCall,
    verdict::Reason,
};

use crate::{
    family::Maps,
    maps::Kernel,
    socket::{Socket, count, forget},
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
    let addr = socket.address_v6();
    match mapped(addr) {
        Some(addr) => connect::<V4>(socket, addr, socket.source_v4(), set_mapped),
        None => connect::<V6>(socket, addr, socket.source_v6(), Socket::set_address_v6),
    }
}

/// A UDP socket, of either family, sends to an IPv4 address that it names.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn socket_sendmsg4(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    send::<V4>(socket, socket.address_v4(), socket.source_v4(), Socket::set_address_v4)
}

/// A UDP socket sends to an IPv6 address that it names; a mapped one is none here.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn socket_sendmsg6(ctx: SockAddrContext) -> i32 {
    let socket = Socket::new(&ctx);
    send::<V6>(socket, socket.address_v6(), socket.source_v6(), Socket::set_address_v6)
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
    let addr = socket.address_v6();
    match mapped(addr) {
        Some(addr) => tell::<V4>(socket, addr, set_mapped),
        None => tell::<V6>(socket, addr, Socket::set_address_v6),
    }
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
    let addr = socket.address_v6();
    match mapped(addr) {
        Some(addr) => tell::<V4>(socket, addr, set_mapped),
        None => tell::<V6>(socket, addr, Socket::set_address_v6),
    }
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
    let addr = socket.address_v6();
    if let Some(addr) = mapped(addr) {
        return bind::<V4>(socket, addr);
    }
    let is_any = addr.differs(Ip6::UNSPECIFIED) == 0;
    if is_any && bind::<V4>(socket, AddrV4::UNSPECIFIED) == END {
        return END;
    }
    bind::<V6>(socket, addr)
}

/// A socket is closed, also by the end of its process.
#[cgroup_sock(sock_release)]
pub(crate) fn socket_release(ctx: SockContext) -> i32 {
    forget(&ctx);
    GO_ON
}

#[inline(always)] // the context must stay the context
fn connect<F: Maps>(socket: Socket, addr: F::Addr, source: F::Addr, set: impl Fn(Socket, F::Addr)) -> i32 {
    let kind = match socket.proto() {
        TCP => SocketCall::TcpConnect,
        UDP => SocketCall::UdpConnect,
        _ => return GO_ON,
    };
    let outcome =
        socket::connect::<F, _>(Kernel::<F>::new(socket.context()), &call::<F>(socket, addr, source));
    settle(socket, kind, &outcome, set)
}

#[inline(always)]
fn send<F: Maps>(socket: Socket, addr: F::Addr, source: F::Addr, set: impl Fn(Socket, F::Addr)) -> i32 {
    let outcome = socket::send::<F, _>(Kernel::<F>::new(socket.context()), &call::<F>(socket, addr, source));
    settle(socket, SocketCall::UdpSend, &outcome, set)
}

#[inline(always)]
fn tell<F: Maps>(socket: Socket, addr: F::Addr, set: impl Fn(Socket, F::Addr)) -> i32 {
    let told = socket::told::<F, _>(
        Kernel::<F>::new(socket.context()),
        socket.proto(),
        socket.cookie(),
        addr,
        socket.port(),
    );
    if let Some((addr, port)) = told {
        set(socket, addr);
        socket.set_port(port);
    }
    GO_ON
}

#[inline(always)]
fn bind<F: Maps>(socket: Socket, addr: F::Addr) -> i32 {
    let port = socket.port();
    if port == [0; 2] || !socket.is_host() {
        return GO_ON;
    }
    if socket::may_bind::<F, _>(Kernel::<F>::new(socket.context()), addr, port, socket.proto()) {
        return GO_ON;
    }
    count(SocketCall::Bind.counter(None));
    Socket::fail(EADDRINUSE);
    END
}

#[inline(always)]
fn call<F: Maps>(socket: Socket, addr: F::Addr, source: F::Addr) -> Call<F::Addr> {
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
fn settle<A: Address>(
    socket: Socket,
    kind: SocketCall,
    outcome: &Outcome<A>,
    set: impl Fn(Socket, A),
) -> i32 {
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
fn mapped(wide: Ip6) -> Option<AddrV4> {
    let addr = AddrV4::from_wide(wide);
    if addr.wide().differs(wide) == 0 { Some(addr) } else { None }
}

#[inline(always)]
fn set_mapped(socket: Socket, addr: AddrV4) {
    socket.set_address_v6(addr.wide());
}
