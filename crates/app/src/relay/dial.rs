//! Reaching a target, directly or through a SOCKS5 proxy (RFC 1928, RFC 1929).

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::anyhow;
use fast_socks5::{
    AuthenticationMethod, ReplyError, SocksError,
    client::{Config, Socks5Stream},
    util::target_addr::TargetAddr,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    settings::{Proxy, Target},
    tcp,
};
use crate::address::HostPort;

/// Of SOCKS.
const VERSION: u8 = 5;

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
    let Some(proxy) = &target.via else { return within(timeout, &target.address).await };
    let reached = tokio::time::timeout(timeout, through(proxy, &target.address));
    let stream = reached.await.map_err(|_| DialError::TimedOut(timeout))??;
    stream.into_std().map_err(|error| DialError::Connect(target.address.to_string(), error))
}

/// Connects to a host, if that does not take too long.
///
/// # Errors
/// Why it could not be reached.
pub async fn within(timeout: Duration, to: &HostPort) -> Result<TcpStream, DialError> {
    let stream =
        tokio::time::timeout(timeout, connect(to)).await.map_err(|_| DialError::TimedOut(timeout))??;
    stream.into_std().map_err(|error| DialError::Connect(to.to_string(), error))
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
        request(stream.get_socket_mut(), &target).await?;
        Ok(stream.get_socket())
    };
    asked.await.map_err(|error| DialError::Proxy { proxy: proxy.address.clone(), what: explain(&error, to) })
}

/// Asks for a connection and reads the reply (RFC 1928, sections 4 to 6). The crate's own
/// panics on a reply that the RFC does not have.
async fn request(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    to: &TargetAddr,
) -> Result<(), SocksError> {
    const CONNECT: u8 = 1;
    const IPV4: u8 = 1;
    const NAME: u8 = 3;
    const IPV6: u8 = 4;
    let mut message = vec![VERSION, CONNECT, 0];
    let port = match to {
        TargetAddr::Ip(SocketAddr::V4(to)) => {
            message.push(IPV4);
            message.extend(to.ip().octets());
            to.port()
        }
        TargetAddr::Ip(SocketAddr::V6(to)) => {
            message.push(IPV6);
            message.extend(to.ip().octets());
            to.port()
        }
        TargetAddr::Domain(name, port) => {
            let length =
                u8::try_from(name.len()).map_err(|_| SocksError::ExceededMaxDomainLen(name.len()))?;
            message.extend([NAME, length]);
            message.extend(name.bytes());
            *port
        }
    };
    message.extend(port.to_be_bytes());
    stream.write_all(&message).await?;
    let mut reply = [0; 4];
    stream.read_exact(&mut reply).await?;
    let [version, code, _, kind] = reply;
    match (version, code) {
        (VERSION, 0) => {}
        (VERSION, 1..=8) => return Err(ReplyError::from_u8(code).into()),
        (VERSION, _) => return Err(anyhow!("reply {code}").into()),
        (version, _) => return Err(SocksError::UnsupportedSocksVersion(version)),
    }
    // The proxy's own address, which is of no use here.
    let length = match kind {
        IPV4 => 4,
        IPV6 => 16,
        NAME => usize::from(stream.read_u8().await?),
        _ => return Err(anyhow!("an address of type {kind}").into()),
    };
    stream.read_exact(&mut vec![0; length + 2]).await?;
    Ok(())
}

fn broke_off(error: &io::Error) -> String {
    match error.kind() == io::ErrorKind::UnexpectedEof {
        true => "broke off in the middle of its answer".into(),
        false => format!("broke off: {error}"),
    }
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
        SocksError::Io(error) => broke_off(error),
        SocksError::Other(other) => match other.chain().find_map(|cause| cause.downcast_ref::<io::Error>()) {
            Some(error) => broke_off(error),
            // The crate makes a text of some errors: tokio's for an end that came too soon.
            None if format!("{other:#}").contains("early eof") => {
                broke_off(&io::ErrorKind::UnexpectedEof.into())
            }
            None => format!("answered with something that is not SOCKS5: {other}"),
        },
        other => format!("answered with something that is not SOCKS5: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of a proxy that sends this, all at once.
    fn said(answer: &[u8]) -> Result<(), String> {
        let proxy: Proxy = "socks5://p:1".parse().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 10);
            theirs.write_all(answer).await.unwrap();
            theirs.shutdown().await.unwrap();
            let asked = ask(ours, &proxy, &"192.0.2.1:80".parse().unwrap()).await;
            asked.map(drop).map_err(|error| error.to_string())
        })
    }

    #[test]
    fn every_reply_is_understood_or_refused() {
        const ADDRESS: [u8; 7] = [1, 0, 0, 0, 0, 0, 0];
        let reply = |code| [&[5, 0, 5, code, 0][..], &ADDRESS].concat();
        assert_eq!(said(&reply(0)), Ok(()));
        assert!(said(&reply(5)).unwrap_err().contains("was refused by 192.0.2.1:80 (reply 5)"));
        // Found by fuzzing: the crate panics on it.
        for code in 9..=255 {
            let error = said(&reply(code)).unwrap_err();
            assert!(error.contains(&format!("not SOCKS5: reply {code}")), "{error}");
        }
        let whole = reply(0);
        for end in 4..whole.len() {
            let error = said(&whole[..end]).unwrap_err();
            assert!(error.contains("broke off in the middle"), "{end}: {error}");
        }
    }
}
