//! The container or unit that a cgroup's path names.

/// What a path tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The container: the engine's word and the name or the first twelve digits of the number.
    pub container: Option<String>,
    /// systemd's unit.
    pub unit: Option<String>,
}

/// The engines' scopes: `docker-<number>.scope` and the like.
const SCOPES: [(&str, &str); 5] = [
    ("docker-", "docker"),
    ("libpod-", "podman"),
    ("cri-containerd-", "containerd"),
    ("crio-", "cri-o"),
    ("buildah-", "buildah"),
];

/// Reads a path in the unified hierarchy.
pub fn of(path: &str) -> Place {
    let mut place = Place::default();
    let mut before = "";
    for part in path.split('/').filter(|part| !part.is_empty()) {
        if let Some(name) = container(part, before) {
            place.container = Some(name);
        }
        if part.ends_with(".service") {
            place.unit = Some(part.to_owned());
        }
        before = part;
    }
    place
}

fn container(part: &str, before: &str) -> Option<String> {
    let scope = part.strip_suffix(".scope").unwrap_or(part);
    for (prefix, engine) in SCOPES {
        if let Some(number) = scope.strip_prefix(prefix).filter(|number| is_number(number)) {
            return Some(format!("{engine}:{}", &number[..12]));
        }
    }
    if let Some(name) = scope.strip_prefix("machine-") {
        return Some(format!("machine:{}", unescaped(name)));
    }
    if let Some(name) = part.strip_prefix("lxc.payload.") {
        return Some(format!("lxc:{name}"));
    }
    match before {
        "docker" if is_number(part) => Some(format!("docker:{}", &part[..12])),
        "lxc" => Some(format!("lxc:{part}")),
        _ if before.starts_with("pod") && is_number(part) => Some(format!("kubernetes:{}", &part[..12])),
        _ => None,
    }
}

/// A container's number: 64 hexadecimal digits.
fn is_number(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// systemd writes `-` in a machine's name as `\x2d`.
fn unescaped(name: &str) -> String {
    name.replace("\\x2d", "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_containers_and_units() {
        let number = "0123456789abcdef".repeat(4);
        for (path, container, unit) in [
            ("/system.slice/nginx.service", None, Some("nginx.service")),
            (&*format!("/system.slice/docker-{number}.scope"), Some("docker:0123456789ab"), None),
            (&*format!("/docker/{number}"), Some("docker:0123456789ab"), None),
            (&*format!("/machine.slice/libpod-{number}.scope/container"), Some("podman:0123456789ab"), None),
            (
                &*format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{number}.scope"),
                Some("containerd:0123456789ab"),
                None,
            ),
            (&*format!("/kubepods/besteffort/pod77/{number}"), Some("kubernetes:0123456789ab"), None),
            (r"/machine.slice/machine-web\x2d1.scope", Some("machine:web-1"), None),
            ("/lxc.payload.mail/system.slice/exim.service", Some("lxc:mail"), Some("exim.service")),
            ("/user.slice/user-1000.slice/session-2.scope", None, None),
            ("", None, None),
        ] {
            let place = of(path);
            assert_eq!((place.container.as_deref(), place.unit.as_deref()), (container, unit), "{path}");
        }
    }
}
