//! Sockets that are older than the programs: no hook saw them made, so the receiving hook meets them first.

use crate::memory::boot_ns;
use crate::{Options, Tally};
use anyhow::{Context, Result, ensure};
use segfw::datapath::Datapath;
use segfw::datapath::attach::HOOKS;
use segfw::policy::compile::testing::{labels, rule, segment};
use segfw::policy::compile::{Clock, compile};
use segfw::policy::host_policy::HostPolicy;
use segfw::policy::tables::Numbers;
use segfw_common::{CgroupEntry, EndpointEntry, EndpointKey};
use segfw_tests::scratch::{Scratch, cgroup_id, enter, own_cgroup};
use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

pub(crate) fn run(_: &Options, tally: &mut Tally) -> Result<()> {
    let home = own_cgroup()?;
    let result = served(tally);
    enter(&home)?;
    result
}

fn served(tally: &mut Tally) -> Result<()> {
    let scratch = Scratch::new()?;
    let server = scratch.cgroup("server")?;
    enter(&server)?;
    let mut listeners = Vec::new();
    for host in ["127.0.0.1", "::1"] {
        let any = SocketAddr::new(host.parse()?, 0);
        listeners.push((TcpListener::bind(any)?, UdpSocket::bind(any)?));
    }
    let datapath = Datapath::load(scratch.pins())?;
    publish(&datapath, &scratch)?;
    let top = File::open(scratch.cgroup("")?)?;
    for hook in HOOKS {
        let _ = datapath.attach(hook, &top)?;
    }
    // As the agent's inventory does.
    let netns = segfw::host::netns::current_cookie()?;
    let party = datapath.cgroups()?.into_iter().find(|(id, _)| cgroup_id(&server).is_ok_and(|s| s == *id));
    let (_, party) = party.context("the server's cgroup is registered")?;
    for (tcp, udp) in &listeners {
        for (address, protocol) in [(tcp.local_addr()?, 6), (udp.local_addr()?, 17)] {
            let key = EndpointKey { netns, addr: address.ip().into(), port: address.port(), protocol, pad: 0 };
            let entry = EndpointEntry { identity: party.identity, workload: party.workload, sockets: 1 };
            datapath.set_endpoint(&key, &entry)?;
        }
    }
    for (tcp, udp) in &listeners {
        let (tcp_address, udp_address) = (tcp.local_addr()?, udp.local_addr()?);
        let name = |who: &str, what: &str| format!("older: {who} over loopback to {what} {}", tcp_address.ip());
        enter(&scratch.cgroup("client")?)?;
        if datapath.features.skb_netns {
            tally.count(name("an allowed client", "a TCP listener on"), connects(tcp_address, true));
            tally.count(name("an allowed client", "a UDP socket on"), sends(udp, udp_address, true));
        } else {
            let why = "cgroup_skb programs cannot ask for the namespace here";
            tally.skip(name("an allowed client", "a TCP listener on"), why);
            tally.skip(name("an allowed client", "a UDP socket on"), why);
        }
        enter(&scratch.cgroup("other")?)?;
        tally.count(name("a denied client", "a TCP listener on"), connects(tcp_address, false));
        tally.count(name("a denied client", "a UDP socket on"), sends(udp, udp_address, false));
    }
    Ok(())
}

fn connects(address: SocketAddr, want: bool) -> Result<()> {
    let result = TcpStream::connect_timeout(&address, Duration::from_millis(700));
    ensure!(result.is_ok() == want, "{result:?}");
    Ok(())
}

fn sends(server: &UdpSocket, address: SocketAddr, want: bool) -> Result<()> {
    server.set_read_timeout(Some(Duration::from_millis(300)))?;
    let client = UdpSocket::bind(SocketAddr::new(address.ip(), 0))?;
    let _ = client.send_to(b"x", address)?;
    let result = server.recv_from(&mut [0]);
    ensure!(result.is_ok() == want, "{result:?}");
    Ok(())
}

fn publish(datapath: &Datapath, scratch: &Scratch) -> Result<()> {
    let mut policy = HostPolicy::default();
    for name in ["server", "client", "other"] {
        policy.segments.push(segment(name, &format!("app={name}")));
    }
    rule(&mut policy, "allow client -> server");
    let sets = ["server", "client", "other"].map(|name| labels(&format!("app={name}")));
    let mut numbers = Numbers::default();
    let clock = Clock { wall: "2026-11-02T09:00:00Z".parse()?, boot_ns: boot_ns() };
    let tables = compile(&policy, &sets, &[], &mut numbers, clock).map_err(|p| anyhow::anyhow!("{p:?}"))?;
    let _ = datapath.publish(&tables)?;
    for (i, (name, set)) in ["server", "client", "other"].into_iter().zip(&sets).enumerate() {
        let path = scratch.cgroup(name)?;
        let entry = CgroupEntry { identity: numbers.labels(set).0, workload: i as u32 + 1, flags: 0, pad: 0 };
        datapath.set_cgroup(cgroup_id(Path::new(&path))?, &entry)?;
    }
    Ok(())
}
