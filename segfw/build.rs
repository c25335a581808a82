//! Builds the eBPF object that `datapath::load` embeds; nothing else happens here.

fn main() -> anyhow::Result<()> {
    // aya-build runs `rustup run TOOLCHAIN cargo`: keep to the toolchain that runs this build.
    let toolchain = std::env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    // SAFETY: a build script is single-threaded here. It lets stable rustc take `-Z build-std=core`.
    unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    let ebpf = concat!(env!("CARGO_MANIFEST_DIR"), "/../segfw-ebpf");
    println!("cargo:rerun-if-changed={}/../segfw-common/src", env!("CARGO_MANIFEST_DIR"));
    aya_build::build_ebpf(
        [aya_build::Package { name: "segfw-ebpf", root_dir: ebpf, ..Default::default() }],
        aya_build::Toolchain::Custom(&toolchain),
    )
}
