//! What is measured: underpass on each path, and the peers, each as its
//! documentation would have it for the most speed.

use std::{
    fmt, fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use underpass::lab::Namespace;

use crate::{load, process::Process, report::say};

/// Something that forwards a port, or nothing in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    Direct,
    /// underpass, on this `--path`.
    Underpass(&'static str),
    Haproxy,
    Nginx,
    Socat,
    /// The binary that `UNDERPASS_REALM` names.
    Realm(PathBuf),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => write!(f, "direct"),
            Self::Underpass(path) => write!(f, "underpass {path}"),
            Self::Haproxy => write!(f, "haproxy"),
            Self::Nginx => write!(f, "nginx stream"),
            Self::Socat => write!(f, "socat"),
            Self::Realm(_) => write!(f, "realm"),
        }
    }
}

impl Subject {
    /// Everything that is measured: what is asked for, in the order of the tables.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Direct];
        all.extend(["auto", "copy", "splice", "kernel"].map(Self::Underpass));
        all.extend([Self::Haproxy, Self::Nginx, Self::Socat]);
        all.extend(std::env::var_os("UNDERPASS_REALM").map(|binary| Self::Realm(binary.into())));
        all
    }

    /// Starts it inside `namespace`, on `cpu` if one is named. Nothing where it says
    /// at once that it cannot work here; why is said on stderr.
    pub fn start(
        &self,
        namespace: &Namespace,
        listen: SocketAddr,
        to: SocketAddr,
        cpu: Option<usize>,
    ) -> Result<Option<Running>> {
        let work = workplace()?;
        let mut command = self.command(&work, listen, to)?;
        let log = work.join("log");
        let output = fs::File::create(&log).context("cannot write a log")?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(output).process_group(0);
        // Threads and children stay on the CPU of the thread that starts them.
        let child = namespace.enter(|| {
            load::pin(cpu)?;
            command.spawn()
        });
        let child = child.with_context(|| format!("cannot start {self}; run ./dev setup bench"))?;
        let mut running = Running(Process { child });
        // Whoever refuses to work does so before it listens.
        for _ in 0..500 {
            if let Some(status) = running.0.child.try_wait()? {
                let why = fs::read_to_string(&log).unwrap_or_default();
                say(format_args!("{self} does not run here ({status}): {}", why.trim()));
                return Ok(None);
            }
            if listens(running.0.child.id(), listen.port()) {
                return Ok(Some(running));
            }
            thread::sleep(Duration::from_millis(20));
        }
        anyhow::bail!("{self} does not listen after ten seconds: {}", fs::read_to_string(&log)?.trim())
    }

    fn command(&self, work: &Path, listen: SocketAddr, to: SocketAddr) -> Result<Command> {
        let (listen, to) = (listen.to_string(), to.to_string());
        Ok(match self {
            Self::Direct => anyhow::bail!("there is nothing to start between client and server"),
            Self::Underpass(path) => {
                let mut command = Command::new(sibling("underpass")?);
                command.args(["relay", "--listen", &listen, "--to", &to, "--path", path]);
                command
            }
            Self::Haproxy => {
                let config = work.join("haproxy.cfg");
                fs::write(&config, haproxy(&listen, &to))?;
                let mut command = Command::new("haproxy");
                command.args(["-db", "-q", "-f"]).arg(config);
                command
            }
            Self::Nginx => {
                let config = work.join("nginx.conf");
                fs::write(&config, nginx(&listen, &to))?;
                let mut command = Command::new("nginx");
                command.args(["-e", "stderr", "-p"]).arg(work).arg("-c").arg(config);
                command
            }
            Self::Socat => {
                let mut command = Command::new("socat");
                let (address, port) = listen.rsplit_once(':').unwrap_or_default();
                command.args(["-b", "65536"]);
                command.arg(format!("TCP-LISTEN:{port},bind={address},fork,reuseaddr,nodelay,backlog=4096"));
                command.arg(format!("TCP:{to},nodelay"));
                command
            }
            Self::Realm(binary) => {
                let mut command = Command::new(binary);
                command.args(["-l", &listen, "-r", &to]);
                command
            }
        })
    }
}

fn haproxy(listen: &str, to: &str) -> String {
    format!(
        "global\n    maxconn 6000\ndefaults\n    mode tcp\n    option splice-auto\n    timeout connect 5s\n    \
         timeout client 1h\n    timeout server 1h\nlisten relay\n    bind {listen}\n    server target {to}\n"
    )
}

fn nginx(listen: &str, to: &str) -> String {
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\npid nginx.pid;\n\
         worker_processes auto;\nerror_log stderr crit;\n\
         events {{ worker_connections 12000; }}\nstream {{\n    proxy_buffer_size 64k;\n    proxy_timeout 1h;\n    \
         server {{ listen {listen} backlog=4096; proxy_pass {to}; }}\n}}\n"
    )
}

/// A relay at work; it and its children end when dropped.
#[derive(Debug)]
pub struct Running(Process);

impl Running {
    /// The memory that its processes alone use, shared pages by their share, in KiB.
    pub fn memory_kib(&self) -> Result<f64> {
        let group = self.0.child.id();
        let mut sum = 0.0;
        for entry in fs::read_dir("/proc")?.flatten() {
            let of_group = fs::read_to_string(entry.path().join("stat"))
                .is_ok_and(|stat| stat_field(&stat, 5) == Some(group));
            if !of_group {
                continue;
            }
            let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap_or_default();
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next());
            sum += pss.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0);
        }
        Ok(sum)
    }
}

/// A number of /proc/PID/stat, counted from 1 as in proc(5); the name before it may
/// hold anything.
fn stat_field(stat: &str, field: usize) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(field - 3)?.parse().ok()
}

/// Whether a socket listens at the port in the network namespace of a process.
fn listens(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        let sockets = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        sockets.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}")));
            local && fields.nth(1) == Some("0A")
        })
    })
}

/// The binary beside this one.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let binary = std::env::current_exe()?.with_file_name(name);
    anyhow::ensure!(binary.exists(), "{} is not there: run ./dev build", binary.display());
    Ok(binary)
}

/// Where configurations and logs of peers lie, beside the binaries.
pub fn workplace() -> Result<PathBuf> {
    let folder = std::env::current_exe()?.with_file_name("bench-work");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}
