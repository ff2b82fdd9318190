//! Private network namespaces: where the demo, the benchmarks and the tests run.
//!
//! A namespace here has no name and no mount: it lives as long as somebody holds
//! its descriptor or runs in it, so nothing is left behind, even after `kill -9`.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

/// A network namespace without a name. Its loopback interface is up.
#[derive(Debug)]
pub struct Namespace {
    net: OwnedFd,
}

impl Namespace {
    /// Makes a new, empty namespace.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN.
    pub fn new() -> Result<Self> {
        let net = on_a_thread(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        })
        .context("cannot make a network namespace (it takes CAP_SYS_ADMIN)")?;
        let namespace = Self { net };
        namespace.up("lo")?;
        Ok(namespace)
    }

    /// Runs `f` on a thread inside the namespace and waits for it. Sockets that it
    /// opens and processes that it starts belong to the namespace.
    ///
    /// # Panics
    /// Where `f` does, and where the namespace cannot be entered.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        on_a_thread(|| {
            setns(&self.net, CloneFlags::CLONE_NEWNET).expect("the right to enter a namespace");
            f()
        })
    }

    /// Starts a process inside the namespace. It is killed when the calling thread
    /// ends, however that happens.
    ///
    /// # Errors
    /// Those of [`Command::spawn`].
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        use nix::sys::{prctl::set_pdeathsig, signal::Signal};
        // SAFETY: between fork and exec only a system call is made.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        // The thread itself has to enter: the signal comes when the thread that has
        // forked ends.
        let home = File::open("/proc/thread-self/ns/net")?;
        setns(&self.net, CloneFlags::CLONE_NEWNET)?;
        let child = command.spawn();
        setns(&home, CloneFlags::CLONE_NEWNET)?;
        child
    }

    /// Joins this namespace with another by a veth pair, both ends up.
    ///
    /// # Errors
    /// Where the kernel refuses, for instance as a name is taken.
    pub fn join(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        let there = other.net.as_raw_fd();
        self.netlink(async |handle| {
            let peer = LinkMessageBuilder::<LinkUnspec>::new()
                .name(other_name.to_owned())
                .setns_by_fd(there)
                .build();
            // The builder's own peer has no namespace; this one has.
            let link = LinkMessageBuilder::<LinkVeth>::new(name, other_name)
                .set_info_data(rtnetlink::packet_route::link::InfoData::Veth(
                    rtnetlink::packet_route::link::InfoVeth::Peer(peer),
                ))
                .build();
            handle.link().add(link).execute().await
        })
        .with_context(|| format!("cannot join namespaces by a veth pair {name}-{other_name}"))?;
        self.up(name)?;
        other.up(other_name)
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// Where there is no such interface.
    pub fn up(&self, name: &str) -> Result<()> {
        self.netlink(async |handle| {
            let link = LinkMessageBuilder::<LinkUnspec>::new().name(name.to_owned()).up().build();
            handle.link().set(link).execute().await
        })
        .with_context(|| format!("cannot set {name} up"))
    }

    /// Gives an interface an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// Where there is no such interface or the kernel refuses the address.
    pub fn address(&self, name: &str, address: impl Into<IpAddr>, prefix: u8) -> Result<()> {
        let address = address.into();
        let index = self.index(name)?;
        self.netlink(async |handle| {
            let mut add = handle.address().add(index, address, prefix);
            add.message_mut().header.flags |= rtnetlink::packet_route::address::AddressHeaderFlags::Nodad;
            add.execute().await
        })
        .with_context(|| format!("cannot give {name} the address {address}/{prefix}"))
    }

    /// A socket that gives out and takes whole frames of an interface: those that come
    /// in on it, and none that leave by it, not even its own.
    ///
    /// # Errors
    /// Needs CAP_NET_RAW, and Linux 4.20.
    pub fn frames(&self, name: &str) -> Result<socket2::Socket> {
        let index = self.index(name)?;
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let socket = self.enter(|| {
            socket2::Socket::new(
                socket2::Domain::PACKET,
                socket2::Type::RAW,
                Some(socket2::Protocol::from(i32::from(protocol))),
            )
        });
        let socket = socket.context("cannot make a packet socket (it takes CAP_NET_RAW)")?;
        let enable: libc::c_int = 1;
        // SAFETY: the option takes an int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_IGNORE_OUTGOING,
                (&raw const enable).cast(),
                size_of_val(&enable) as libc::socklen_t,
            )
        };
        nix::errno::Errno::result(result).context("cannot ignore outgoing frames")?;
        // SAFETY: the storage is large enough for a sockaddr_ll, which is written in full
        // as far as bind(2) reads it, and its length is given back.
        let ((), address) = unsafe {
            socket2::SockAddr::try_init(|storage, length| {
                let address = storage.cast::<libc::sockaddr_ll>();
                (*address).sll_family = libc::AF_PACKET as u16;
                (*address).sll_protocol = protocol;
                (*address).sll_ifindex = index as i32;
                *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                Ok(())
            })
        }?;
        socket.bind(&address).with_context(|| format!("cannot bind a packet socket to {name}"))?;
        Ok(socket)
    }

    /// The number of an interface.
    ///
    /// # Errors
    /// Where there is no such interface.
    pub fn index(&self, name: &str) -> Result<u32> {
        self.enter(|| nix::net::if_::if_nametoindex(name)).with_context(|| format!("no interface {name}"))
    }

    /// Talks netlink inside the namespace.
    fn netlink<T: Send>(
        &self,
        f: impl AsyncFnOnce(Handle) -> Result<T, rtnetlink::Error> + Send,
    ) -> Result<T> {
        self.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection()?;
                let connection = tokio::spawn(connection);
                let result = f(handle).await;
                connection.abort();
                Ok(result?)
            })
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.net.as_fd()
    }
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(f).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
