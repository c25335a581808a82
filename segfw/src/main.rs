fn main() {
    let dir = std::path::Path::new("/sys/fs/bpf/segfw-dev");
    let _ = segfw::datapath::attach::remove(dir);
    let dp = match segfw::datapath::Datapath::load(dir) {
        Ok(d) => d,
        Err(segfw::datapath::Error::Program { name, source }) => {
            let t = format!("{source}");
            let t: String =
                t.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
            eprintln!("{name}: {t}");
            std::process::exit(1)
        }
        Err(e) => {
            eprintln!("{e}");
            std::process::exit(1)
        }
    };
    for p in dp.programs() {
        println!("{p} {:?}", segfw::datapath::sys::program_info(dp.program(p).unwrap()).unwrap());
    }
    let mut t = segfw::policy::Tables::default();
    t.classes = vec![vec![0; 65536]; 8];
    println!("{:?}", dp.publish(&t));
    println!("{:?}", dp.publish(&t));
    println!("{:?}", dp.counters().map(|c| c.by_rule.len()));
    segfw::datapath::attach::remove(dir).unwrap();
}
