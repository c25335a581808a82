//! How bpf-linker makes code of the programs; nothing else happens here.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Without it small blocks of zeros are a call to a loop that writes byte by byte: five instructions each.
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
}
