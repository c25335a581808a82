//! Which kernels there are: `xtask/kernels.lock`, and how it is renewed from Debian's signed package lists.

use super::folder;
use crate::{root, say};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's packages are if this machine's own sources do not say.
const MIRROR: &str = "http://deb.debian.org/";
/// The key that signs Debian's package lists.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Debian's suites that hold the kernels of the matrix, below `debian/` and `debian-security/`.
const SUITES: [(&str, &str); 6] = [
    ("debian", "bullseye"),
    ("debian", "bookworm"),
    ("debian", "bookworm-backports"),
    ("debian", "trixie-backports"),
    ("debian-security", "bullseye-security"),
    ("debian-security", "bookworm-security"),
];
/// The lines of the matrix: name, how the version begins, how it ends. The newest is the last one; its name follows it.
const LINES: [(&str, &str, &str); 5] = [
    ("5.10", "5.10.", ""),
    ("6.1", "6.1.", ""),
    ("6.12", "6.12.", "+deb12"),
    ("6.18", "6.18.", "+deb13"),
    ("7", "7.", "+deb13"),
];

/// A package of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    /// Below the mirror, as in a URL.
    pub(super) path: String,
    pub(super) sha256: String,
}

impl Package {
    /// As the file is called on disk.
    pub(super) fn file(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// A kernel of the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    /// As people name it: `6.1`.
    pub(super) name: String,
    /// As `uname -r` names it.
    pub(super) release: String,
    pub(super) packages: Vec<Package>,
}

fn file() -> PathBuf {
    root().join("xtask/kernels.lock")
}

/// Every kernel of the list, oldest first.
pub(super) fn all() -> Result<Vec<Kernel>> {
    let path = file();
    parse(&fs::read_to_string(&path).with_context(|| path.display().to_string())?)
}

fn parse(text: &str) -> Result<Vec<Kernel>> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[name, release, path, sha256] = words.as_slice() else {
            bail!("kernels.lock:{}: four columns are needed: name, release, path, sha256", number + 1);
        };
        ensure!(
            sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit()),
            "kernels.lock:{}: not a sha256: {sha256}",
            number + 1
        );
        let package = Package { path: path.to_owned(), sha256: sha256.to_owned() };
        match kernels.iter_mut().find(|k| k.name == name) {
            Some(kernel) => kernel.packages.push(package),
            None => {
                kernels.push(Kernel { name: name.to_owned(), release: release.to_owned(), packages: vec![package] });
            }
        }
    }
    ensure!(!kernels.is_empty(), "kernels.lock names no kernel");
    Ok(kernels)
}

/// Kernels by name; `all`, `oldest` and `newest` are names too.
pub(super) fn select(names: &[String]) -> Result<Vec<Kernel>> {
    let all = all()?;
    let known = || all.iter().map(|k| k.name.as_str()).collect::<Vec<_>>().join(", ");
    let mut wanted: Vec<Kernel> = Vec::new();
    for name in names.iter().flat_map(|n| n.split(',')) {
        let found: Vec<&Kernel> = match name {
            "all" => all.iter().collect(),
            "oldest" => all.first().into_iter().collect(),
            "newest" => all.last().into_iter().collect(),
            _ => all.iter().filter(|k| k.name == name || k.release == name).collect(),
        };
        ensure!(
            !found.is_empty(),
            "no kernel {name} in xtask/kernels.lock: it has {}, and knows all, oldest, newest",
            known()
        );
        for kernel in found {
            if !wanted.contains(kernel) {
                wanted.push(kernel.clone());
            }
        }
    }
    Ok(wanted)
}

/// The mirror that this machine is set up to use, up to and with the slash before `debian/`.
pub(super) fn mirror() -> String {
    let said =
        Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).output();
    let said = said.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    said.lines().find_map(|uri| uri.strip_suffix("debian/")).unwrap_or(MIRROR).to_owned()
}

/// Debian's lists of its own, so that the machine's sources stay as they are.
pub(super) struct Lists(PathBuf);

impl Lists {
    /// Fetches them: some 50 MB.
    pub(super) fn update() -> Result<Self> {
        let dir = folder().join("apt");
        fs::create_dir_all(dir.join("lists/partial"))?;
        fs::create_dir_all(dir.join("archives/partial"))?;
        let mirror = mirror();
        let source = |(part, suite): &(&str, &str)| format!("deb [signed-by={KEYRING}] {mirror}{part} {suite} main\n");
        fs::write(dir.join("sources.list"), SUITES.iter().map(source).collect::<String>())?;
        let lists = Self(dir);
        say("fetching Debian's package lists (50 MB)");
        crate::run(Command::new("apt-get").args(lists.options()).args(["update", "-qq"]))?;
        Ok(lists)
    }

    pub(super) fn options(&self) -> Vec<String> {
        let dir = self.0.display();
        [
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache::archives={dir}/archives"),
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect()
    }

    fn output(&self, program: &str, args: &[&str], dir: &Path) -> Result<String> {
        let output = Command::new(program).args(self.options()).args(args).current_dir(dir).output().context("apt")?;
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The newest build of a line, with the hashes that Debian signed.
    fn newest(&self, (name, begin, end): (&str, &str, &str)) -> Result<Kernel> {
        let begin = format!("linux-image-{begin}");
        let names = self.output("apt-cache", &["pkgnames", &begin], &self.0)?;
        let end = format!("{end}-amd64");
        let number = |release: &str| -> Vec<u32> {
            release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
        };
        let release = names
            .lines()
            .filter_map(|n| n.strip_prefix("linux-image-"))
            .filter(|r| {
                // Nothing between the number and the end: no `rt`, no `cloud`.
                r.strip_suffix(&end).is_some_and(|v| v.bytes().all(|b| b.is_ascii_digit() || b".-".contains(&b)))
            })
            .max_by_key(|r| number(r))
            .with_context(|| format!("Debian's lists have no kernel {name}"))?;
        // From 7 on the image is a stub, and the kernel is in two other packages.
        let split = release.starts_with("7.");
        let packages = match split {
            false => vec![format!("linux-image-{release}")],
            true => vec![format!("linux-binary-{release}"), format!("linux-modules-{release}")],
        };
        let mut args = vec!["download", "--print-uris"];
        args.extend(packages.iter().map(String::as_str));
        let said = self.output("apt-get", &args, &self.0)?;
        let mirror = mirror();
        let mut found = Vec::new();
        for line in said.lines().filter(|l| l.starts_with('\'')) {
            let uri = line.split('\'').nth(1).unwrap_or_default();
            let path = uri.strip_prefix(&mirror).with_context(|| format!("{uri} is not below {mirror}"))?;
            let sha256 = line.split("SHA256:").nth(1).with_context(|| format!("no SHA256 in: {line}"))?;
            found.push(Package { path: path.to_owned(), sha256: sha256.trim().to_owned() });
        }
        ensure!(found.len() == packages.len(), "apt-get found {} of {} packages: {said}", found.len(), packages.len());
        let name = if split { release.split('.').take(2).collect::<Vec<_>>().join(".") } else { name.to_owned() };
        Ok(Kernel { name, release: release.to_owned(), packages: found })
    }

    /// The newest build of the line that a kernel belongs to.
    pub(super) fn successor(&self, kernel: &Kernel) -> Result<Kernel> {
        let line = LINES.iter().rev().find(|(_, begin, _)| kernel.release.starts_with(begin));
        self.newest(*line.with_context(|| format!("no line of Debian's kernels for {}", kernel.release))?)
    }
}

/// Writes the newest builds into `xtask/kernels.lock`.
pub(super) fn renew() -> Result<()> {
    let lists = Lists::update()?;
    let old = fs::read_to_string(file()).unwrap_or_default();
    let mut text: String = old.lines().filter(|l| l.starts_with('#')).map(|l| format!("{l}\n")).collect();
    for line in LINES {
        let kernel = lists.newest(line)?;
        for Package { path, sha256 } in &kernel.packages {
            text += &format!("{} {} {path} {sha256}\n", kernel.name, kernel.release);
        }
        say(&format!("{}: {}", kernel.name, kernel.release));
    }
    fs::write(file(), text).with_context(|| file().display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_in_the_tree_is_good() {
        let kernels = all().expect("kernels.lock");
        assert_eq!(kernels.len(), LINES.len());
        for (kernel, (_, begin, _)) in kernels.iter().zip(LINES) {
            assert!(kernel.release.starts_with(begin), "{kernel:?}");
            assert!(kernel.release.starts_with(&kernel.name), "{kernel:?}");
        }
    }

    #[test]
    fn names_select() {
        let names = |text: &str| {
            let found = select(&[text.to_owned()]).map(|k| k.into_iter().map(|k| k.name).collect::<Vec<_>>());
            found.map_err(|e| e.to_string())
        };
        assert_eq!(names("oldest,6.1,oldest"), Ok(vec!["5.10".to_owned(), "6.1".to_owned()]));
        assert_eq!(names("all").map(|all| all.len()), Ok(LINES.len()));
        assert!(names("4.19").is_err_and(|e| e.contains("no kernel 4.19")));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert!(parse("6.1 x\n").is_err_and(|e| e.to_string().contains("kernels.lock:1")));
        assert!(parse("# nothing\n").is_err());
        assert!(parse("6.1 r p nohash\n").is_err_and(|e| e.to_string().contains("sha256")));
    }
}
