//! Builds the kernel programs (crates/kernel) and hands their objects to
//! `src/object.rs`, which carries them in the binary.
//!
//! Two toolchains will do, tried in this order:
//! 1. rustup's nightly with `rust-src`: `core` is built for the BPF target;
//! 2. a packaged Rust that has `core` for the BPF target (Debian:
//!    `libstd-rust-web-dev-bpf`), with `RUSTC_BOOTSTRAP=1`.
//!
//! Both need `bpf-linker` in the PATH or in cargo's bin folder.
//!
//! And builds the page of `watch --web` (ui/) by npm, which `src/watch/web/assets.rs`
//! carries. Without npm the binary has no page and says so.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The database that ui/build/pack.ts puts beside the page.
const COUNTRIES: &str = "countries.mmdb";

const TARGET: &str = "bpfel-unknown-none";
/// Programs are compiled for the instruction set of Linux 5.1 and up.
const RUSTFLAGS: &[&str] = &["-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf", "-Clinker=bpf-linker"];

fn main() {
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let crates = manifest.parent().expect("crates/app has a parent");
    for input in ["kernel/src", "kernel/Cargo.toml", "kernel/Cargo.lock", "abi/src", "logic/src"] {
        println!("cargo:rerun-if-changed={}", crates.join(input).display());
    }
    let out = PathBuf::from(var("OUT_DIR"));
    build(&crates.join("kernel"), &out);
    for input in ["src", "build", "public", "index.html", "login.html", "package-lock.json", "vite.config.ts"]
    {
        println!("cargo:rerun-if-changed={}", manifest.join("ui").join(input).display());
    }
    build_page(&manifest.join("ui"), &out);
}

/// Builds the page into `OUT_DIR/ui`, every file packed, and lists what there is in
/// `OUT_DIR/web_assets.rs`.
fn build_page(ui: &Path, out: &Path) {
    let built = out.join("ui");
    let list = if Command::new("npm").arg("--version").output().is_ok_and(|output| output.status.success()) {
        install_packages(ui);
        npm(ui, &["run", "--silent", "build", "--", "--outDir"], Some(&built));
        let mut files = vec![];
        collect(&built, &built, &mut files);
        files.sort();
        files
    } else {
        println!(
            "cargo:warning=no npm: `watch --web` will have no page and know no countries; run ./dev setup"
        );
        vec![]
    };
    let entry = |name: &str| format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/ui/{name}.gz\"))");
    let (countries, files): (Vec<_>, Vec<_>) = list.iter().partition(|name| *name == COUNTRIES);
    let file = |name: &&String| format!("    (\"/{name}\", \"{}\", {}),\n", mime(name), entry(name));
    let files: String = files.iter().map(file).collect();
    let countries = countries.first().map(|name| format!("Some({})", entry(name)));
    let source = format!(
        "const FILES: &[(&str, &str, &[u8])] = &[\n{files}];\npub const COUNTRIES: Option<&[u8]> = {};\n",
        countries.as_deref().unwrap_or("None")
    );
    fs::write(out.join("web_assets.rs"), source).expect("OUT_DIR can be written");
}

/// What package-lock.json says, once; another build waits for it.
fn install_packages(ui: &Path) {
    let lock = fs::File::open(ui.join("package-lock.json")).expect("ui/package-lock.json");
    lock.lock().expect("a lock on ui/package-lock.json");
    let modified = |file: &str| fs::metadata(ui.join(file)).and_then(|metadata| metadata.modified()).ok();
    if modified("node_modules/.package-lock.json") < modified("package-lock.json") {
        npm(ui, &["ci", "--silent", "--no-audit", "--no-fund"], None);
        // npm keeps the time at which the packages were made.
        let done = fs::File::options().write(true).open(ui.join("node_modules/.package-lock.json"));
        done.and_then(|file| file.set_modified(std::time::SystemTime::now()))
            .expect("npm has installed packages");
    }
}

fn npm(ui: &Path, args: &[&str], last: Option<&Path>) {
    let status = Command::new("npm").current_dir(ui).args(args).args(last).status();
    let status = status.unwrap_or_else(|e| panic!("cannot start npm: {e}"));
    assert!(status.success(), "npm {} failed: the page of `watch --web` did not build", args.join(" "));
}

/// The names of packed files below a folder, without `.gz`.
fn collect(root: &Path, folder: &Path, into: &mut Vec<String>) {
    for entry in
        fs::read_dir(folder).unwrap_or_else(|e| panic!("npm built nothing into {}: {e}", folder.display()))
    {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(root, &path, into);
        } else if let Some(name) =
            path.strip_prefix(root).ok().and_then(Path::to_str).and_then(|n| n.strip_suffix(".gz"))
        {
            into.push(name.to_owned());
        }
    }
}

fn mime(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("txt") => "text/plain; charset=utf-8",
        Some("json") => "application/json",
        _ => panic!("ui builds {name}: mime() in build.rs does not know its type"),
    }
}

fn build(kernel: &Path, out: &Path) {
    let target_dir = shared(out).join("kernel");
    let mut cargo = toolchain();
    cargo
        .current_dir(kernel)
        .args(["build", "--release", "--bins", "--locked", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\x1f"))
        .env("PATH", path_with_cargo_bin());
    // What cargo tells this build script about the host's compiler must not
    // reach the kernel side's.
    for name in [
        "RUSTC",
        "RUSTDOC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "CARGO",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().unwrap_or_else(|e| panic!("cannot start {cargo:?}: {e}; run ./dev setup"));
    assert!(status.success(), "the kernel programs did not build; run ./dev setup if a tool is missing");

    let built = target_dir.join(TARGET).join("release");
    for entry in fs::read_dir(kernel.join("src/bin")).expect("kernel/src/bin") {
        let source = entry.expect("an entry of kernel/src/bin").path();
        let name = source.file_stem().expect("a file name");
        let object = out.join(name).with_extension("o");
        fs::copy(built.join(name), &object)
            .unwrap_or_else(|e| panic!("no object for {}: {e}", source.display()));
    }
}

/// Cargo's target folder, which holds a tag: the objects are the same for whichever profile
/// and machine the binary is built, so they are compiled once.
fn shared(out: &Path) -> &Path {
    out.ancestors().filter(|folder| folder.join("CACHEDIR.TAG").exists()).last().unwrap_or(out)
}

/// The cargo that can build for the BPF target.
fn toolchain() -> Command {
    if let Some(sysroot) = sysroot(Command::new("rustup").args(["run", "nightly", "rustc"]))
        && sysroot.join("lib/rustlib/src/rust/library/core").is_dir()
    {
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo", "-Zbuild-std=core"]);
        cargo.env_remove("RUSTUP_TOOLCHAIN");
        return cargo;
    }
    // Where rustup is first in the PATH, the packaged Rust still is in /usr/bin.
    let path = env::var_os("PATH").unwrap_or_default();
    for folder in env::split_paths(&path).chain(["/usr/bin".into()]) {
        if let Some(sysroot) = sysroot(&mut Command::new(folder.join("rustc")))
            && sysroot.join("lib/rustlib").join(TARGET).is_dir()
        {
            let mut cargo = Command::new(folder.join("cargo"));
            cargo.env("RUSTC_BOOTSTRAP", "1").arg("--config").arg(rustc_of(&folder));
            return cargo;
        }
    }
    panic!(
        "no Rust here builds for {TARGET}: it takes rustup's nightly with rust-src, or Debian's \
         rustc-web, cargo-web and libstd-rust-web-dev-bpf; run ./dev setup"
    )
}

/// Tells cargo which compiler to take: RUSTC is removed from its environment.
fn rustc_of(folder: &Path) -> OsString {
    let mut config = OsString::from("build.rustc=\"");
    config.push(folder.join("rustc"));
    config.push("\"");
    config
}

/// Where a compiler keeps its libraries; nothing if there is no such compiler.
fn sysroot(rustc: &mut Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

fn path_with_cargo_bin() -> OsString {
    let mut folders: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    folders.extend(home.map(|home| home.join("bin")));
    env::join_paths(folders).expect("PATH holds no odd entry")
}

fn var(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}
