//! Packages: what a release hands out, all from one binary.
//!
//! A release is linked statically (glibc, `+crt-static`): one binary for every distribution and for an image of nothing
//! else. With `--profile dev` the packages are for tests on this machine: quick to build, not for others.

use crate::setup::{install, run_quietly, tool};
use crate::{cargo, has, root, run, say, target};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");
const CARGO_GENERATE_RPM: (&str, &str) = ("cargo-generate-rpm", "0.21.0");
const CARGO_CYCLONEDX: (&str, &str) = ("cargo-cyclonedx", "0.5.9");

/// What `--only` may name, in the order in which they are made.
const KINDS: [&str; 5] = ["deb", "rpm", "tarball", "oci", "sbom"];
/// Shells that `segfw completions` is asked for, with the place of the file below /usr/share.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/segfw"),
    ("zsh", "zsh/vendor-completions/_segfw"),
    ("fish", "fish/vendor_completions.d/segfw.fish"),
];
/// Documents of the packages; one that is not there yet is left out.
const DOCS: [&str; 6] = ["README.md", "CHANGELOG.md", "LICENSE", "LICENSE-APACHE", "LICENSE-GPL", "ARCHITECTURE.md"];

struct Dist {
    release: bool,
    /// `x86_64-unknown-linux-gnu`.
    triple: String,
    version: String,
    binary: PathBuf,
    /// Where the results go.
    out: PathBuf,
}

pub(crate) fn run_all(args: &[String]) -> Result<()> {
    let (mut release, mut only) = (true, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.next().map(String::as_str)) {
            ("--profile", Some("release")) => release = true,
            ("--profile", Some("dev")) => release = false,
            ("--only", Some(kind)) if KINDS.contains(&kind) => only = Some(kind.to_owned()),
            _ => bail!("usage: cargo xtask dist [--profile release|dev] [--only {}]", KINDS.join("|")),
        }
    }
    let wanted = |kind: &str| only.as_deref().is_none_or(|o| o == kind);
    let dist = build(release)?;
    stage(&dist)?;
    let mut skipped = Vec::new();
    for kind in KINDS.iter().filter(|k| wanted(k)) {
        say(&format!("dist: {kind}"));
        let made = match *kind {
            "deb" => deb(&dist)?,
            "rpm" => rpm(&dist)?,
            "tarball" => tarball(&dist)?,
            "oci" => oci(&dist)?,
            _ => sbom(&dist)?,
        };
        match made {
            Made::File(path) => shown(&path)?,
            Made::Skipped(why) => skipped.push(format!("{kind}: {why}")),
        }
    }
    sums(&dist)?;
    skipped.iter().for_each(|s| say(&format!("dist: SKIPPED {s}")));
    Ok(())
}

enum Made {
    File(PathBuf),
    Skipped(&'static str),
}

fn shown(path: &Path) -> Result<()> {
    let size = fs::metadata(path).with_context(|| path.display().to_string())?.len();
    say(&format!("dist: {} ({:.1} MiB)", path.display(), size as f64 / f64::from(1 << 20)));
    Ok(())
}

/// The tool, installed once into target/tools.
fn ready((name, version): (&str, &str)) -> Result<PathBuf> {
    let path = tool(name);
    if !path.is_file() {
        install(name, version, &[])?;
    }
    Ok(path)
}

fn build(release: bool) -> Result<Dist> {
    let about = Command::new("rustc").args(["--version", "--verbose"]).current_dir(root()).output().context("rustc")?;
    let about = String::from_utf8_lossy(&about.stdout).into_owned();
    let triple = about.lines().find_map(|l| l.strip_prefix("host: ")).context("rustc names no host")?.to_owned();
    say(if release { "dist: building, release, static (some minutes)" } else { "dist: building, dev" });
    let mut command = cargo();
    command.args(["build", "--quiet", "--package", "segfw"]);
    let binary = if release {
        command.args(["--release", "--target", &triple]);
        // Not RUSTFLAGS: the eBPF programs are built by the same cargo for another target.
        let variable = format!("CARGO_TARGET_{}_RUSTFLAGS", triple.to_uppercase().replace('-', "_"));
        command.env(variable, "-C target-feature=+crt-static");
        target().join(&triple).join("release/segfw")
    } else {
        target().join("debug/segfw")
    };
    run(&mut command)?;
    let out = if release { root().join("target/dist") } else { root().join("target/dist/dev") };
    fs::create_dir_all(&out)?;
    Ok(Dist { release, triple, version: env!("CARGO_PKG_VERSION").to_owned(), binary, out })
}

/// Everything below /usr/share, and the binary, where the packagers look for them (`segfw/Cargo.toml`).
fn stage(dist: &Dist) -> Result<()> {
    let stage = root().join("target/dist/stage");
    if stage.is_dir() {
        fs::remove_dir_all(&stage)?;
    }
    let share = stage.join("share");
    let doc = share.join("doc/segfw");
    fs::create_dir_all(doc.join("examples"))?;
    for name in DOCS {
        let _ = fs::copy(root().join(name), doc.join(name)).with_context(|| name.to_owned())?;
    }
    for (from, to) in [("docs", doc.clone()), ("policies", doc.join("examples"))] {
        for entry in fs::read_dir(root().join(from))? {
            let path = entry?.path();
            if let (true, Some(name)) = (path.is_file(), path.file_name()) {
                let _ = fs::copy(&path, to.join(name))?;
            }
        }
    }
    let daemonset = root().join("deploy/kubernetes/daemonset.yaml");
    let _ = fs::copy(daemonset, doc.join("examples/kubernetes-daemonset.yaml"))?;
    for (shell, path) in COMPLETIONS {
        let output = Command::new(&dist.binary).args(["completions", shell]).output()?;
        if output.status.success() {
            let path = share.join(path);
            fs::create_dir_all(path.parent().unwrap_or(&share))?;
            fs::write(path, output.stdout)?;
        }
    }
    let man = share.join("man/man1");
    fs::create_dir_all(&man)?;
    if !run_quietly(Command::new(&dist.binary).arg("man").arg(&man)) || fs::read_dir(&man)?.next().is_none() {
        say("dist: no man pages and completions: this build has no `segfw man`, `segfw completions`");
        fs::remove_dir_all(share.join("man"))?;
    } else if has("gzip") {
        run(Command::new("sh").arg("-c").arg("gzip -9n \"$0\"/*").arg(&man))?;
    }
    let _ = fs::copy(&dist.binary, stage.join("segfw"))?;
    if has("strip") {
        run(Command::new("strip").arg("--strip-unneeded").arg(stage.join("segfw")))?;
    }
    Ok(())
}

fn deb(dist: &Dist) -> Result<Made> {
    let tool = ready(CARGO_DEB)?;
    let path = dist.out.join(format!("segfw_{}_{}.deb", dist.version, debian_arch(&dist.triple)));
    let mut command = Command::new(tool);
    command.current_dir(root()).args(["--package", "segfw", "--no-build", "--no-strip", "--quiet"]);
    command.args(["--deb-revision", ""]).arg("--output").arg(&path);
    if dist.release {
        command.args(["--target", &dist.triple]);
    }
    run(&mut command)?;
    Ok(Made::File(path))
}

fn debian_arch(triple: &str) -> &str {
    match triple.split('-').next().unwrap_or(triple) {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn rpm(dist: &Dist) -> Result<Made> {
    let tool = ready(CARGO_GENERATE_RPM)?;
    let arch = dist.triple.split('-').next().unwrap_or_default();
    let path = dist.out.join(format!("segfw-{}-1.{arch}.rpm", dist.version));
    // Its own search for shared libraries is of no use: the binary is static, and the units need systemd alone.
    let mut command = Command::new(tool);
    command.current_dir(root()).args(["--package", "segfw", "--auto-req", "disabled", "--arch", arch]);
    run(command.arg("--output").arg(&path))?;
    if has("rpm") {
        run(Command::new("rpm")
            .args(["--query", "--package", "--queryformat"])
            .arg("xtask: dist: rpm reads it as %{NAME} %{VERSION}-%{RELEASE} %{ARCH}, %{LICENSE}\\n")
            .arg(&path))?;
    }
    Ok(Made::File(path))
}

/// The tree of the .deb without its scripts: for hosts with neither dpkg nor rpm.
fn tarball(dist: &Dist) -> Result<Made> {
    let name = format!("segfw-{}-{}", dist.version, dist.triple);
    let tree = root().join("target/dist/stage").join(&name);
    let place = |from: PathBuf, to: &str, mode: u32| -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let to = tree.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&tree))?;
        let _ = fs::copy(&from, &to).with_context(|| from.display().to_string())?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    let packaging = root().join("packaging");
    place(root().join("target/dist/stage/segfw"), "usr/bin/segfw", 0o755)?;
    place(packaging.join("on-remove"), "usr/lib/segfw/on-remove", 0o755)?;
    for unit in ["segfw.service", "segfw-early.service"] {
        place(packaging.join("systemd").join(unit), &format!("usr/lib/systemd/system/{unit}"), 0o644)?;
    }
    place(packaging.join("etc/agent.yaml"), "etc/segfw/agent.yaml", 0o644)?;
    place(packaging.join("etc/policies/README"), "etc/segfw/policies/README", 0o644)?;
    run(Command::new("cp").arg("-r").arg(root().join("target/dist/stage/share")).arg(tree.join("usr/share")))?;
    let path = dist.out.join(format!("{name}.tar.gz"));
    run(Command::new("tar")
        .args(["--create", "--gzip", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{}", commit_time()))
        .arg("--directory")
        .arg(root().join("target/dist/stage"))
        .arg("--file")
        .arg(&path)
        .arg(&name))?;
    Ok(Made::File(path))
}

/// Of the commit: the same commit gives the same archive.
fn commit_time() -> String {
    let output = Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(root()).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    if text.is_empty() { "0".to_owned() } else { text }
}

/// An image layout in one file, from nothing but the binary: no engine, no base image, no network.
fn oci(dist: &Dist) -> Result<Made> {
    if !dist.release {
        return Ok(Made::Skipped("the dev build is not static; an image needs --profile release"));
    }
    if !has("buildah") {
        return Ok(Made::Skipped("there is no buildah (apt-get install buildah)"));
    }
    let store = root().join("target/dist/buildah");
    let buildah = |args: &[&str]| -> Command {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(store.join("root")).arg("--runroot").arg(store.join("run"));
        command.args(["--storage-driver", "vfs"]).args(args);
        command
    };
    let path = dist.out.join(format!("segfw-{}-{}.oci.tar", dist.version, debian_arch(&dist.triple)));
    if path.exists() {
        fs::remove_file(&path)?;
    }
    let output = buildah(&["from", "scratch"]).output().context("buildah")?;
    if !output.status.success() {
        bail!("buildah from scratch: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let container = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let made = (|| {
        let binary = root().join("target/dist/stage/segfw").display().to_string();
        run(buildah(&["copy", "--quiet", "--chmod", "0755", &container, &binary, "/usr/bin/segfw"])
            .stdout(std::process::Stdio::null()))?;
        let version = format!("org.opencontainers.image.version={}", dist.version);
        run(&mut buildah(&[
            "config",
            "--entrypoint",
            "[\"/usr/bin/segfw\"]",
            "--cmd",
            "agent",
            "--label",
            "org.opencontainers.image.title=segfw",
            "--label",
            &version,
            "--label",
            "org.opencontainers.image.licenses=Apache-2.0 OR GPL-2.0-only",
            &container,
        ]))?;
        let to = format!("oci-archive:{}:segfw:{}", path.display(), dist.version);
        run(buildah(&["commit", "--quiet", "--timestamp", &commit_time(), &container, &to])
            .stdout(std::process::Stdio::null()))
    })();
    let _ = run_quietly(&mut buildah(&["rm", "--all"]));
    let _ = fs::remove_dir_all(&store);
    made.map(|()| Made::File(path))
}

/// CycloneDX: what the binary is made of.
fn sbom(dist: &Dist) -> Result<Made> {
    let tool = ready(CARGO_CYCLONEDX)?;
    let name = format!("segfw-{}.cdx", dist.version);
    let mut command = Command::new(tool);
    command.current_dir(root()).args(["cyclonedx", "--manifest-path", "segfw/Cargo.toml", "--format", "json"]);
    command.args(["--override-filename", &name, "--target", &dist.triple, "--quiet"]);
    run(&mut command)?;
    let path = dist.out.join(format!("{name}.json"));
    // It writes one beside each member's manifest.
    for member in ["segfw", "segfw-common", "segfw-ebpf", "xtask", "tests"] {
        let made = root().join(member).join(format!("{name}.json"));
        if made.is_file() {
            if member == "segfw" {
                let _ = fs::copy(&made, &path)?;
            }
            fs::remove_file(made)?;
        }
    }
    Ok(Made::File(path))
}

fn sums(dist: &Dist) -> Result<()> {
    let mut names: Vec<String> = fs::read_dir(&dist.out)?
        .flatten()
        .filter(|e| e.path().is_file())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains(&dist.version))
        .collect();
    names.sort();
    let output = Command::new("sha256sum").args(&names).current_dir(&dist.out).output().context("sha256sum")?;
    if !output.status.success() {
        bail!("sha256sum: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    fs::write(dist.out.join("SHA256SUMS"), output.stdout)?;
    shown(&dist.out.join("SHA256SUMS"))
}
