//! Reaching a target, directly or through a SOCKS5 proxy (RFC 1928, RFC 1929).

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use fast_socks5::{
    AuthenticationMethod, ReplyError, Socks5Command, SocksError,
    client::{Config, Socks5Stream},
    util::target_addr::TargetAddr,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    settings::{Proxy, Target},
    tcp,
};
use crate::address::HostPort;

/// Why a target was not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("cannot resolve {0}: {1}")]
    Resolve(String, io::Error),
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    #[error("not reached within {0:?}")]
    TimedOut(Duration),
    #[error("the proxy {proxy} {what}")]
    Proxy { proxy: HostPort, what: String },
}

/// Starts to connect to an address; the socket becomes writable when that is done.
///
/// # Errors
/// Where the kernel refuses at once, for instance as there is no route.
pub fn start(address: SocketAddr) -> io::Result<TcpStream> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    tcp::limit_receive_queue(&socket);
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// Connects to a target, trying each of its addresses.
///
/// # Errors
/// Why it could not be reached.
pub async fn dial(target: &Target, timeout: Duration) -> Result<TcpStream, DialError> {
    let reached = tokio::time::timeout(timeout, async {
        match &target.via {
            None => connect(&target.address).await,
            Some(proxy) => through(proxy, &target.address).await,
        }
    });
    let stream = reached.await.map_err(|_| DialError::TimedOut(timeout))??;
    stream.into_std().map_err(|error| DialError::Connect(target.address.to_string(), error))
}

/// The addresses of a host.
///
/// # Errors
/// Where its name has none.
pub async fn resolve(host: &HostPort) -> Result<Vec<SocketAddr>, DialError> {
    let failed = |error| DialError::Resolve(host.host.clone(), error);
    let addresses: Vec<_> =
        tokio::net::lookup_host((host.host.as_str(), host.port)).await.map_err(failed)?.collect();
    if addresses.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::NotFound, "the name has no address")));
    }
    Ok(addresses)
}

/// Connects to a host, trying each of its addresses.
///
/// # Errors
/// Why it could not be reached.
pub async fn connect(to: &HostPort) -> Result<tokio::net::TcpStream, DialError> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in resolve(to).await? {
        match connect_to(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(DialError::Connect(to.to_string(), last))
}

async fn connect_to(address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let stream = tokio::net::TcpStream::from_std(start(address)?)?;
    stream.writable().await?;
    stream.take_error()?.map_or(Ok(stream), Err)
}

async fn through(proxy: &Proxy, to: &HostPort) -> Result<tokio::net::TcpStream, DialError> {
    ask(connect(&proxy.address).await?, proxy, to).await
}

/// Asks the proxy at the other end of a stream to reach a target.
///
/// # Errors
/// What the proxy answered instead.
pub async fn ask<S>(stream: S, proxy: &Proxy, to: &HostPort) -> Result<S, DialError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let login =
        proxy.login.clone().map(|(username, password)| AuthenticationMethod::Password { username, password });
    let target = match to.ip() {
        Some(ip) => TargetAddr::Ip((ip, to.port).into()),
        // The proxy resolves it: what people call socks5h.
        None => TargetAddr::Domain(to.host.clone(), to.port),
    };
    let asked = async {
        let mut stream = Socks5Stream::use_stream(stream, login, Config::default()).await?;
        stream.request(Socks5Command::TCPConnect, target).await?;
        Ok(stream.get_socket())
    };
    asked.await.map_err(|error| DialError::Proxy { proxy: proxy.address.clone(), what: explain(&error, to) })
}

/// What a proxy's answer means, for people. Nothing of the login is in it.
#[expect(clippy::wildcard_enum_match_arm, reason = "the crate's other errors are all about its encoding")]
fn explain(error: &SocksError, to: &HostPort) -> String {
    match error {
        SocksError::ReplyError(reply) => match reply {
            ReplyError::Succeeded => "answered with success where a failure was expected".into(),
            ReplyError::GeneralFailure => format!("failed to reach {to} (general failure, reply 1)"),
            ReplyError::ConnectionNotAllowed => format!("does not allow connections to {to} (reply 2)"),
            ReplyError::NetworkUnreachable => format!("cannot reach the network of {to} (reply 3)"),
            ReplyError::HostUnreachable => format!("cannot reach the host of {to} (reply 4)"),
            ReplyError::ConnectionRefused => format!("was refused by {to} (reply 5)"),
            ReplyError::ConnectionTimeout => format!("ran out of time reaching {to}"),
            ReplyError::TtlExpired => format!("could not reach {to}: the TTL expired on the way (reply 6)"),
            ReplyError::CommandNotSupported => "does not support CONNECT (reply 7)".into(),
            ReplyError::AddressTypeNotSupported => {
                format!("does not support addresses like that of {to} (reply 8)")
            }
        },
        SocksError::AuthenticationRejected(_) => "rejected the user or the password".into(),
        SocksError::AuthMethodUnacceptable(_) => {
            "accepts none of the ways to log in that were offered; does it want a user and a password?".into()
        }
        SocksError::UnsupportedSocksVersion(version) => {
            format!("does not speak SOCKS5: its answer begins with byte {version}, not 5")
        }
        SocksError::Io(error) => format!("broke off: {error}"),
        SocksError::Other(other) => match other.chain().find_map(|cause| cause.downcast_ref::<io::Error>()) {
            Some(error) => format!("broke off: {error}"),
            None => format!("answered with something that is not SOCKS5: {other}"),
        },
        other => format!("answered with something that is not SOCKS5: {other}"),
    }
}
