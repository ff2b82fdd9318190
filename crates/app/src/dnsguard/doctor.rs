//! What dnsguard finds when it tries itself.

use anyhow::Context as _;
use aya::programs::{Program, XdpMode};

use super::{
    Rules,
    attach::{DNSGUARD, load},
};
use crate::{
    doctor::{Check, Function},
    lab::Namespace,
    pins,
};

/// Loads each program, and attaches it to a veth of a namespace of its own.
pub(crate) fn doctor() -> Function {
    let mut missing = vec![];
    let mut checks = vec![];
    let mut check = |name: &str, result: Result<String, String>| {
        let (ok, detail) = match result {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        checks.push(Check { name: name.into(), ok, detail });
        ok
    };
    let bpffs =
        check("bpffs", pins::mounted().map(|path| path.display().to_string()).map_err(|e| e.to_string()));
    let opened = Rules::new(&[], None).and_then(|rules| load(&rules, None));
    let mut ebpf = match opened {
        Ok(ebpf) => ebpf,
        Err(error) => {
            let why = error.to_string();
            check("object", Err(why.clone()));
            return Function { name: "dnsguard", works: false, missing: vec![why], checks };
        }
    };
    let mut loads = true;
    for name in [DNSGUARD.ingress.xdp, DNSGUARD.ingress.tc, DNSGUARD.egress] {
        let result = match ebpf.program_mut(name) {
            Some(Program::Xdp(program)) => program.load(),
            Some(Program::SchedClassifier(program)) => program.load(),
            _ => continue,
        };
        let result = result.map(|()| "the verifier takes it".to_owned()).map_err(|error| error.to_string());
        loads &= check(name, result);
    }
    let mut hooks = 0;
    for (name, mode) in [("native XDP", XdpMode::Driver), ("generic XDP", XdpMode::Skb)] {
        hooks += u32::from(check(name, try_xdp(&mut ebpf, mode).map_err(|error| format!("{error:#}"))));
    }
    if !bpffs {
        missing.push("a bpffs: run `mount -t bpf bpf /sys/fs/bpf` as root".to_owned());
    }
    if hooks == 0 {
        missing.push("XDP: only TC is left".to_owned());
    }
    Function { name: "dnsguard", works: bpffs && loads, missing, checks }
}

fn try_xdp(ebpf: &mut aya::Ebpf, mode: XdpMode) -> anyhow::Result<String> {
    let (here, there) = (Namespace::new()?, Namespace::new()?);
    here.join("doctor0", &there, "doctor0")?;
    let index = here.index("doctor0")?;
    let program: &mut aya::programs::Xdp =
        ebpf.program_mut(DNSGUARD.ingress.xdp).context("no XDP program")?.try_into()?;
    let link = here.enter(|| program.attach_to_if_index(index, mode))?;
    program.detach(link)?;
    Ok("attached to a veth of its own".to_owned())
}
