//! `segfw` as a later build would be: the same program, another layout.

fn main() -> std::process::ExitCode {
    segfw::datapath::load::pretend_later_layout();
    segfw::cli::main()
}
