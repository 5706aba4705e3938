//! Sockets, as kube-proxy's HTTP servers have them.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::TcpListener;

/// Every address, of both families.
pub(crate) const EVERYWHERE: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Listens on an address; on every address of both families if it is `::`.
///
/// One socket takes both, unless `net.ipv6.bindv6only` says otherwise; without IPv6 there is IPv4 only.
///
/// # Errors
/// When the kernel refuses.
pub(crate) async fn listen(address: SocketAddr) -> io::Result<Vec<TcpListener>> {
    if address.ip() != EVERYWHERE {
        return Ok(vec![TcpListener::bind(address).await?]);
    }
    let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
    let both = match TcpListener::bind(address).await {
        Ok(both) => both,
        Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(error),
        // There is no IPv6; if it is something else, IPv4 meets it too.
        Err(_) => return Ok(vec![TcpListener::bind(v4).await?]),
    };
    // Port 0 means any, but the same for both.
    let v4 = SocketAddr::new(v4.ip(), both.local_addr()?.port());
    match TcpListener::bind(v4).await {
        Ok(v4) => Ok(vec![both, v4]),
        Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(vec![both]),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn everywhere_means_both_families() {
        let listeners = listen(SocketAddr::new(EVERYWHERE, 0)).await.expect("a port");
        let port = listeners[0].local_addr().expect("bound").port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("IPv4");
        if listeners[0].local_addr().expect("bound").is_ipv6() {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.expect("IPv6");
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_refused() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = taken.local_addr().expect("bound");
        assert_eq!(listen(address).await.expect_err("taken").kind(), ErrorKind::AddrInUse);
        let everywhere = SocketAddr::new(EVERYWHERE, address.port());
        assert_eq!(listen(everywhere).await.expect_err("taken").kind(), ErrorKind::AddrInUse);
    }
}
