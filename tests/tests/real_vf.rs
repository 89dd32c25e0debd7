//! The model of the 82599's VF, judged by drivers that were written for the real device: Linux's ixgbevf and DPDK's net_ixgbe_vf.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testkit::process::{Launch, run};
use testkit::qemu::RunningGuest;
use testkit::require;
use testkit::skip::tool;
use testkit::vf::{self, Kernel, Machine, Model};

const COMMAND: Duration = Duration::from_secs(120);

/// Two VFs whose PF takes jumbo frames.
fn two_vfs() -> Result<Model> {
    Model::start(
        &["mac=02:00:00:00:00:01", "mac=02:00:00:00:00:02"],
        &["--mtu", "9000"],
    )
}

/// Moves the two interfaces into network namespaces `a` and `b`, with addresses 10.0.0.1 and 10.0.0.2.
fn separate(guest: &mut RunningGuest) -> Result<()> {
    for (name, interface, station) in [("a", "eth0", 1), ("b", "eth1", 2)] {
        let inside = format!("ip netns exec {name} ip");
        let lines = format!(
            "ip netns add {name} && ip link set {interface} netns {name} && {inside} link set {interface} name eth && \
             {inside} addr add 10.0.0.{station}/24 dev eth && {inside} link set lo up && {inside} link set eth up"
        );
        guest.command(&lines, COMMAND)?;
    }
    for name in ["a", "b"] {
        let up = format!(
            "for i in $(seq 100); do ip netns exec {name} cat /sys/class/net/eth/carrier | grep -q 1 && break; sleep 0.1; done; \
             ip netns exec {name} cat /sys/class/net/eth/carrier | grep -q 1"
        );
        guest.command(&up, COMMAND)?;
    }
    Ok(())
}

/// Pings from one namespace; every one must be answered.
fn ping_from(guest: &mut RunningGuest, from: &str, to: &str, size: u32, count: u32) -> Result<()> {
    pings(guest, &format!("ip netns exec {from}"), to, size, count)
}

fn ping(guest: &mut RunningGuest, to: &str, size: u32, count: u32) -> Result<()> {
    pings(guest, "", to, size, count)
}

fn pings(guest: &mut RunningGuest, with: &str, to: &str, size: u32, count: u32) -> Result<()> {
    let line = format!("{with} ping -c {count} -i 0.2 -W 10 -s {size} {to}");
    let text = guest.command(&line, COMMAND)?;
    ensure!(
        text.contains(&format!("{count} packets received")),
        "{size} bytes: {text}"
    );
    Ok(())
}

/// A counter of the interface in a namespace.
fn counter(guest: &mut RunningGuest, namespace: &str, name: &str) -> Result<u64> {
    let line = format!("ip netns exec {namespace} cat /sys/class/net/eth/statistics/{name}");
    let text = guest.command(&line, COMMAND)?;
    let number = text.lines().find_map(|line| line.trim().parse().ok());
    number.with_context(|| format!("{name}: {text}"))
}

/// What the driver counted is what the device counted.
fn equal_counters(guest: &mut RunningGuest, model: &mut Model) -> Result<()> {
    for (vf, namespace) in ["a", "b"].into_iter().enumerate() {
        // Neighbour discovery may come in between: such a frame is counted on both sides at the next look.
        let mut pairs = Vec::new();
        let equal = (0..20).any(|_| {
            let one = counter(guest, namespace, "rx_packets").and_then(|rx| {
                let tx = counter(guest, namespace, "tx_packets")?;
                Ok((rx, tx))
            });
            let two = model.seen(vf).map(|seen| (seen.rx_frames, seen.tx_frames));
            let same = matches!((&one, &two), (Ok(one), Ok(two)) if one == two);
            pairs.push(format!("driver {one:?}, device {two:?}"));
            same
        });
        ensure!(equal, "VF {vf}: {pairs:?}\n{}", model.command("show")?);
    }
    Ok(())
}

fn tcp(guest: &mut RunningGuest, address: &str) -> Result<()> {
    guest.command(
        "ip netns exec b iperf3 -s -D -1 >/tmp/server 2>&1; sleep 1",
        COMMAND,
    )?;
    let text = guest.command(
        &format!(
            "ip netns exec a iperf3 -c {address} -n 8M --connect-timeout 10000; cat /tmp/server"
        ),
        COMMAND,
    )?;
    ensure!(text.contains("receiver"), "{text}");
    Ok(())
}

/// Both receive and both transmit queues carried frames, and no checksum was wrong.
fn used_both_queues(guest: &mut RunningGuest) -> Result<()> {
    let text = guest.command("ip netns exec a ethtool -S eth", COMMAND)?;
    let value = |name: String| {
        let lines = text.lines().filter_map(|line| line.trim().split_once(": "));
        let mut named = lines.filter(|(key, _)| *key == name);
        named
            .next()
            .and_then(|(_, value)| value.parse::<u64>().ok())
    };
    for direction in ["rx", "tx"] {
        for queue in 0..2 {
            let frames = value(format!("{direction}_queue_{queue}_packets"));
            ensure!(frames > Some(0), "{direction} queue {queue}: {text}");
        }
    }
    ensure!(
        value("rx_csum_offload_errors".to_owned()) == Some(0),
        "{text}"
    );
    Ok(())
}

/// Linux's driver against itself: pings of all sizes, TCP, VLAN, jumbo frames, two queues.
fn linux_on(kernel: Kernel, iommu: bool) -> Result<()> {
    let mut model = two_vfs()?;
    let machine = Machine {
        iommu,
        ..Machine::new(kernel, &model, 2)
    };
    let mut guest = machine.boot()?;
    separate(&mut guest)?;
    for size in [56, 1400, 30_000] {
        ping_from(&mut guest, "a", "10.0.0.2", size, 10)?;
    }
    tcp(&mut guest, "10.0.0.2")?;
    equal_counters(&mut guest, &mut model)?;
    for (namespace, station) in [("a", 1), ("b", 2)] {
        let inside = format!("ip netns exec {namespace} ip");
        let line = format!(
            "{inside} link add link eth name eth.7 type vlan id 7 && {inside} addr add 10.0.7.{station}/24 dev eth.7 && {inside} link set eth.7 up"
        );
        guest.command(&line, COMMAND)?;
    }
    ping_from(&mut guest, "a", "10.0.7.2", 1400, 5)?;
    tcp(&mut guest, "10.0.7.2")?;
    for namespace in ["a", "b"] {
        guest.command(
            &format!("ip netns exec {namespace} ip link set eth mtu 9000"),
            COMMAND,
        )?;
    }
    ping_from(&mut guest, "b", "10.0.0.1", 8900, 10)?;
    tcp(&mut guest, "10.0.0.2")?;
    used_both_queues(&mut guest)?;
    model.assert_clean(2)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn linux_of_debian_12_takes_the_model_for_a_real_vf() -> Result<()> {
    require!(vf::available());
    linux_on(Kernel::Old, false)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn a_newer_linux_behind_an_iommu_takes_the_model_for_a_real_vf() -> Result<()> {
    require!(vf::available());
    linux_on(Kernel::New, true)
}

/// A guest whose first VF is bound to vfio-pci, behind an IOMMU, with our responder on it; the second has the kernel's driver.
fn our_driver_on(kernel: Kernel, model: &Model) -> Result<RunningGuest> {
    let machine = Machine {
        iommu: true,
        modules: vec!["vfio", "net"],
        programs: vec![vf::binary("vf-responder")?],
        script: "mkfifo /tmp/in\nsleep 100000 >/tmp/in &".to_owned(),
        ..Machine::new(kernel, model, 2)
    };
    let mut guest = machine.boot()?;
    hand_to_vfio(&mut guest)?;
    kernel_peer(&mut guest)?;
    start_responder(&mut guest)?;
    Ok(guest)
}

/// Takes the first VF from the kernel's driver and hands it to VFIO; its PCI address is `$vf` from now on.
fn hand_to_vfio(guest: &mut RunningGuest) -> Result<()> {
    guest.command(
        "vf=$(basename $(readlink -f /sys/class/net/eth0/device)); d=/sys/bus/pci/devices/$vf; \
         echo $vf >$d/driver/unbind; echo vfio-pci >$d/driver_override; echo $vf >/sys/bus/pci/drivers_probe; \
         ls -l $d/driver | grep vfio-pci",
        COMMAND,
    )?;
    Ok(())
}

/// The second VF with the kernel's driver: 10.0.0.2, and frames as long as the PF takes.
fn kernel_peer(guest: &mut RunningGuest) -> Result<()> {
    guest.command(
        "ip link set eth1 mtu 9000 && ip addr add 10.0.0.2/24 dev eth1 && ip link set eth1 up && \
         for i in $(seq 100); do grep -q 1 /sys/class/net/eth1/carrier && break; sleep 0.1; done",
        COMMAND,
    )?;
    Ok(())
}

fn start_responder(guest: &mut RunningGuest) -> Result<()> {
    guest.command(
        "vf-responder $vf 10.0.0.1 </tmp/in >/tmp/out 2>&1 & sleep 0.1; \
         for i in $(seq 100); do grep -q ready /tmp/out && break; sleep 0.1; done; cat /tmp/out; grep -q ready /tmp/out",
        COMMAND,
    )?;
    Ok(())
}

/// Says something to the program that reads /tmp/in and waits for what it answers.
fn tell(guest: &mut RunningGuest, command: &str, answer: &str) -> Result<String> {
    guest.command(&format!("echo {command} >/tmp/in"), COMMAND)?;
    said(guest, answer)
}

/// Waits until the program that writes /tmp/out has said this.
fn said(guest: &mut RunningGuest, what: &str) -> Result<String> {
    // A prompt has no end of line.
    let line = format!(
        "for i in $(seq 300); do grep -q '{what}' /tmp/out && break; sleep 0.1; done; cat /tmp/out; echo; grep -q '{what}' /tmp/out"
    );
    guest.command(&line, COMMAND)
}

/// Our driver over the kernel's VFIO and an IOMMU, its peer the kernel's ixgbevf: pings, a reset, a crash, memory taken away.
fn our_driver_lives_on(kernel: Kernel) -> Result<()> {
    let mut model = two_vfs()?;
    let mut guest = our_driver_on(kernel, &model)?;
    for size in [56, 1400] {
        ping(&mut guest, "10.0.0.1", size, 10)?;
    }
    let text = tell(&mut guest, "show", "received")?;
    let seen = model.seen(0)?;
    let same = format!("received {} sent {}", seen.rx_frames, seen.tx_frames);
    ensure!(text.contains(&same), "device: {same}; driver: {text}");
    // Both interrupts arrive: the PF's word, and a frame while the driver sleeps.
    model.command("cable off")?;
    model.command("cable on")?;
    tell(&mut guest, "show", "signals [1-9]")?;
    tell(&mut guest, "arm", "armed")?;
    guest.command("ping -c 1 -W 20 10.0.0.1; true", COMMAND)?;
    let text = said(&mut guest, "woken")?;
    ensure!(!text.contains("not woken"), "{text}");
    tell(&mut guest, "reset", "restarted")?;
    ping(&mut guest, "10.0.0.1", 56, 5)?;
    // A crash leaves rings and mappings; the next one starts from a reset.
    guest.command(
        "kill -9 $(pidof vf-responder); sleep 0.5; ! pidof vf-responder",
        COMMAND,
    )?;
    start_responder(&mut guest)?;
    ping(&mut guest, "10.0.0.1", 1400, 5)?;
    model.assert_clean(2)?;
    // Memory that was taken back is out of the device's reach: the next frame is a fault, and no more than one.
    tell(&mut guest, "unmap", "unmapped")?;
    guest.command("ping -c 3 -i 0.2 -W 1 10.0.0.1; true", COMMAND)?;
    let seen = model.seen(0)?;
    ensure!(
        seen.faults == 1 && seen.misuses == 0,
        "{}",
        model.command("show")?
    );
    ensure!(model.seen(1)?.faults == 0);
    Ok(())
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn our_driver_lives_on_debian_12_with_vfio_and_an_iommu() -> Result<()> {
    require!(vf::available());
    our_driver_lives_on(Kernel::Old)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn our_driver_lives_on_a_newer_linux_with_vfio_and_an_iommu() -> Result<()> {
    require!(vf::available());
    our_driver_lives_on(Kernel::New)
}

/// DPDK's own driver on the first VF, behind an IOMMU, with frames up to 9018 bytes, VLANs and two queues; it answers ARP and ping.
/// Its peer is the kernel's.
fn dpdk_on(kernel: Kernel, testpmd: Testpmd) -> Result<()> {
    let mut model = two_vfs()?;
    let machine = Machine {
        iommu: true,
        modules: vec!["vfio", "net"],
        programs: vec![vf::line_buffer()?],
        others: testpmd.files,
        script: "mkfifo /tmp/in\nsleep 100000 >/tmp/in &\nchmod 755 / /pmd\necho 128 >/proc/sys/vm/nr_hugepages"
            .to_owned(),
        ..Machine::new(kernel, &model, 2)
    };
    let mut guest = machine.boot()?;
    hand_to_vfio(&mut guest)?;
    kernel_peer(&mut guest)?;
    guest.command(
        &format!("{} -l 0-1 -a $vf --in-memory -m 160 --no-telemetry -- \
         --total-num-mbufs=8192 --forward-mode=icmpecho --max-pkt-len=9018 --enable-scatter --tx-offloads=0x8000 \
         --enable-hw-vlan-filter --rxq=2 --txq=2 -i --auto-start </tmp/in >/tmp/out 2>&1 &", testpmd.command),
        COMMAND,
    )?;
    said(&mut guest, "icmpecho packet forwarding - ports=1")?;
    for size in [56, 1400, 8900] {
        ping(&mut guest, "10.0.0.1", size, 10)?;
    }
    // Addresses enough for both of two queues.
    for station in 3..11 {
        guest.command(
            &format!(
                "ip addr add 10.0.0.{station}/24 dev eth1 && ping -c 2 -i 0.1 -W 10 -I 10.0.0.{station} 10.0.0.1"
            ),
            COMMAND,
        )?;
    }
    tell(&mut guest, "rx_vlan add 7 0", "testpmd> $")?;
    guest.command(
        "ip link add link eth1 name eth1.7 type vlan id 7 && ip addr add 10.0.7.2/24 dev eth1.7 && ip link set eth1.7 up",
        COMMAND,
    )?;
    ping(&mut guest, "10.0.7.1", 1400, 5)?;
    let text = tell(&mut guest, "stop", "Accumulated forward statistics")?;
    // "RX-packets: 12   TX-packets: 10   TX-dropped: 0" for each queue.
    for queue in 0..2 {
        let stream = text
            .split_once(&format!("TX Port= 0/Queue= {queue} "))
            .with_context(|| text.clone())?;
        ensure!(
            value(stream.1, "RX-packets:") > Some(0),
            "queue {queue}: {text}"
        );
    }
    same_counters(&mut guest, &mut model)?;
    model.assert_clean(2)
}

/// What testpmd counted is what the device counted.
fn same_counters(guest: &mut RunningGuest, model: &mut Model) -> Result<()> {
    // The other end's neighbour discovery may come between the two looks: such a frame is counted on both sides at the next one.
    let mut looks = Vec::new();
    for look in 1..=20 {
        guest.command("echo show port stats 0 >/tmp/in", COMMAND)?;
        let line = format!(
            "for i in $(seq 300); do [ $(grep -c Throughput /tmp/out) = {look} ] && break; sleep 0.1; done; cat /tmp/out; echo"
        );
        let text = guest.command(&line, COMMAND)?;
        let (_, text) = text
            .rsplit_once("NIC statistics for port 0")
            .with_context(|| text.clone())?;
        let seen = model.seen(0)?;
        let equal = [
            ("RX-packets:", seen.rx_frames),
            ("TX-packets:", seen.tx_frames),
            ("RX-bytes:", seen.rx_bytes),
            ("TX-bytes:", seen.tx_bytes),
        ]
        .iter()
        .all(|(name, device)| value(text, name) == Some(*device));
        if equal {
            return Ok(());
        }
        looks.push(format!("device {seen:?}: {text}"));
    }
    bail!("{}", looks.join("\n"))
}

/// The number behind a word of testpmd's tables.
fn value(text: &str, name: &str) -> Option<u64> {
    let mut words = text.split_whitespace().skip_while(|word| *word != name);
    words.nth(1)?.parse().ok()
}

/// A release of testpmd, and how it is started in the guest.
struct Testpmd {
    command: &'static str,
    files: Vec<(PathBuf, String)>,
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn dpdk_of_debian_12_takes_the_model_for_a_real_vf() -> Result<()> {
    require!(vf::available());
    require!(tool("dpdk-testpmd", "dpdk-dev").map(drop));
    let testpmd = Testpmd {
        command: "LD_LIBRARY_PATH=/debian12 LD_PRELOAD= _STDBUF_O=L /debian12/ld.so --library-path /debian12 \
                  --preload /debian12/libstdbuf.so /debian12/dpdk-testpmd -d /debian12/pmd",
        files: vf::testpmd_of_debian_12()?,
    };
    dpdk_on(Kernel::Old, testpmd)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn a_newer_dpdk_takes_the_model_for_a_real_vf() -> Result<()> {
    require!(vf::available());
    let testpmd = Testpmd {
        command: "LD_PRELOAD=/bin/libstdbuf.so _STDBUF_O=L dpdk-testpmd -d /pmd",
        files: Vec::new(),
    };
    dpdk_on(Kernel::New, testpmd)
}

/// The wire is a TAP interface in a network namespace of its own: this machine's kernel pings our driver, which sits behind the model
/// in a third process.
#[test]
#[ignore = "real peer: run by tests/run"]
fn frames_leave_the_device_by_a_tap_interface_and_come_back() -> Result<()> {
    require!(vf::available());
    require!(tool("unshare", "util-linux").map(drop));
    require!(tool("busybox", "busybox-static").map(drop));
    let wire = ["--wire", "tap:wire0", "--mtu", "9000"];
    let mut model = Model::start_by(&["unshare", "-n"], &["mac=02:00:00:00:00:01"], &wire)?;
    let inside = format!(
        "nsenter --net=/proc/{}/ns/net busybox",
        model.process().pid()
    );
    let socket = model.socket(0).display().to_string();
    let command = [
        vf::binary("vf-responder")?.display().to_string(),
        socket,
        "10.0.0.1".to_owned(),
    ];
    let mut responder = Launch::new("vf-responder", command).start()?;
    responder.wait_for_text(0, COMMAND, "ready")?;
    let shell = format!(
        "{inside} ip link set wire0 mtu 1500 up && {inside} ip addr add 10.0.0.2/24 dev wire0 && \
         {inside} ping -c 5 -W 10 -s 1400 10.0.0.1"
    );
    let text = run(["sh", "-c", &shell], COMMAND)?;
    ensure!(text.contains("5 packets received"), "{text}");
    let seen = model.seen(0)?;
    ensure!(
        seen.rx_frames >= 6 && seen.tx_frames >= 6,
        "{seen:?}: pings and ARP"
    );
    model.assert_clean(1)
}
