//! The whole way: a container with testpmd, the switch, our driver, the model of the NIC, its second VF, Linux's ixgbevf in a guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ringway::control::config::{Config, Workers};
use ringway::control::spec::parse_port;
use ringway::control::state::{Idle, PortState};
use ringway::guest::traffic::station;
use ringway::guest::{Guest, Options, QueuePair};
use testkit::docker::{self, Docker};
use testkit::qemu::RunningGuest;
use testkit::require;
use testkit::ringway::{Ringway, server_port};
use testkit::testpmd::{self, Memory, Testpmd, VirtioUser};
use testkit::topology::exchange_among_others;
use testkit::vf::{self, Kernel, Machine, Model};

const PATIENCE: Duration = Duration::from_secs(60);
const COMMAND: Duration = Duration::from_secs(120);

/// A container that answers pings, two innocents and the uplink.
fn switch_on(model: &Model) -> Result<Ringway> {
    let uplink = format!("ixgbevf:uplink,vfio-user={}", model.socket(0).display());
    let mut ports: Vec<_> = ["blue", "red", "green"].map(server_port).into();
    ports.push(parse_port(&uplink, "test")?);
    let config = Config {
        workers: Workers::Cpus(vec![0]),
        idle: Idle::Adaptive,
        ports,
        ..Config::default()
    };
    Ringway::start_told(config, &["--sandbox", "strict"])
}

/// A container without rights in which testpmd answers ARP and pings, whatever address they are for.
fn container(docker: &Docker, switch: &Ringway) -> Result<Testpmd> {
    let port = VirtioUser::new(switch.socket("blue"), 0x0b);
    let mut config = testpmd::Config {
        vdevs: vec![port.vdev(0)],
        memory: Memory::NoHuge(256),
        inside: docker.run_line("blue", switch.dir(), docker::TESTPMD),
        ..testpmd::Config::default()
    };
    let forward = ["--port-topology=loop", "--forward-mode=icmpecho"];
    config.args.extend(forward.map(str::to_owned));
    let mut client = config.start()?;
    client.wait_links_up(PATIENCE)?;
    client.command("start")?;
    Ok(client)
}

/// A guest with the kernel's driver on the second VF, 10.0.0.2.
fn linux_beyond(model: &Model) -> Result<RunningGuest> {
    let machine = Machine {
        sockets: vec![model.socket(1)],
        ..Machine::new(Kernel::Old, model, 2)
    };
    let mut guest = machine.boot()?;
    guest.command(
        "echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip addr add 10.0.0.2/24 dev eth0 && ip link set eth0 up && \
         for i in $(seq 100); do grep -q 1 /sys/class/net/eth0/carrier && break; sleep 0.1; done; grep 1 /sys/class/net/eth0/carrier",
        COMMAND,
    )?;
    Ok(guest)
}

/// Waits until the container answers, then asks `count` times more: every ping must come back.
fn ping(guest: &mut RunningGuest, size: u32, count: u32) -> Result<()> {
    guest.command(
        "for i in $(seq 60); do ping -c 1 -W 1 10.0.0.1 >/dev/null && break; done; ping -c 1 -W 10 10.0.0.1",
        COMMAND,
    )?;
    let line = format!("ping -c {count} -i 0.2 -W 10 -s {size} 10.0.0.1");
    let text = guest.command(&line, COMMAND)?;
    let all = format!("{count} packets received");
    ensure!(text.contains(&all), "{size} bytes: {text}");
    Ok(())
}

fn counter(guest: &mut RunningGuest, name: &str) -> Result<u64> {
    let text = guest.command(
        &format!("cat /sys/class/net/eth0/statistics/{name}"),
        COMMAND,
    )?;
    let number = text.lines().find_map(|line| line.trim().parse().ok());
    number.with_context(|| format!("{name}: {text}"))
}

/// Received and sent, at each station of the way; pairs that must be equal stand together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Way {
    container: (u64, u64),
    container_port: (u64, u64),
    uplink: (u64, u64),
    first_vf: (u64, u64),
    second_vf: (u64, u64),
    linux: (u64, u64),
}

impl Way {
    fn look(
        client: &mut Testpmd,
        switch: &Ringway,
        model: &mut Model,
        guest: &mut RunningGuest,
    ) -> Result<Way> {
        let stats = client.stats()?[0];
        let (blue, uplink) = (
            switch.port("blue")?.counters,
            switch.port("uplink")?.counters,
        );
        let (first, second) = (model.seen(0)?, model.seen(1)?);
        Ok(Way {
            container: (stats.rx_packets, stats.tx_packets),
            container_port: (blue.sent, blue.received),
            uplink: (uplink.received, uplink.sent),
            first_vf: (first.rx_frames, first.tx_frames),
            second_vf: (second.rx_frames, second.tx_frames),
            linux: (counter(guest, "rx_packets")?, counter(guest, "tx_packets")?),
        })
    }

    fn agrees(&self) -> bool {
        self.container == self.container_port
            && self.uplink == self.first_vf
            && self.second_vf == self.linux
    }
}

/// What each side counted is what its neighbour counted.
fn equal_counters(
    client: &mut Testpmd,
    switch: &Ringway,
    model: &mut Model,
    guest: &mut RunningGuest,
) -> Result<Way> {
    switch.balanced_books()?;
    let end = Instant::now() + PATIENCE;
    loop {
        // Now and then the guest asks who is there: such a frame is counted everywhere at the next look.
        let way = Way::look(client, switch, model, guest)?;
        if way.agrees() {
            return Ok(way);
        }
        ensure!(
            Instant::now() < end,
            "{way:#?}\n{}\n{:?}",
            model.command("show")?,
            switch.port("uplink")?
        );
    }
}

/// Two guests at the same switch whose frames must all arrive, whatever happens to the wire.
struct Innocents {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Innocents {
    fn start(switch: &Ringway) -> Result<Innocents> {
        let attach = |name| -> Result<(Guest, QueuePair)> {
            let mut guest = Guest::new(Options::new(switch.socket(name)))?;
            let pair = guest.attach()?.remove(0);
            switch.wait_port(name, PortState::Forwarding, PATIENCE)?;
            Ok((guest, pair))
        };
        // Green only listens: nobody would learn where it is, and all its frames would go everywhere.
        let listener = ringway::dataplane::eth::Mac::from_bytes(station(2)).to_string();
        switch.command(&["fdb", "add", &listener, "green"])?;
        let (red_guest, mut red) = attach("red")?;
        let (green_guest, mut green) = attach("green")?;
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<AtomicU64>::default(),
        );
        let (told, counted) = (stop.clone(), rounds.clone());
        let thread = std::thread::spawn(move || {
            let _alive = (red_guest, green_guest);
            while !told.load(Relaxed) {
                exchange_among_others(&mut red, &mut green, 50, 128, 16)?;
                red.rx.receive(|_| ());
                counted.fetch_add(1, Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        Ok(Innocents {
            stop,
            rounds,
            thread,
        })
    }

    fn go_on(&self) -> Result<()> {
        let (end, goal) = (Instant::now() + PATIENCE, self.rounds.load(Relaxed) + 5);
        while self.rounds.load(Relaxed) < goal {
            ensure!(Instant::now() < end, "the innocents stand still");
            if self.thread.is_finished() {
                break; // `finish` says why
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.stop.store(true, Relaxed);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the innocents panicked"))?
    }
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn a_container_is_pinged_by_linux_beyond_the_nic_and_outlives_a_pulled_cable_and_a_reset_pf()
-> Result<()> {
    require!(vf::available(), docker::available());
    let docker = Docker::start()?;
    let mut model = Model::start(
        &[
            "trust,spoofchk=off",
            "mac=02:00:00:00:00:02,trust,spoofchk=off",
        ],
        &[],
    )?;
    let switch = switch_on(&model)?;
    let mut guest = linux_beyond(&model)?;
    switch.wait_port("uplink", PortState::Forwarding, PATIENCE)?;
    let mut client = container(&docker, &switch)?;
    for size in [56, 1400] {
        ping(&mut guest, size, 10)?;
    }
    let way = equal_counters(&mut client, &switch, &mut model, &mut guest)?;
    ensure!(way.container.1 > 20 && way.linux.0 > 20, "{way:?}");

    let innocents = Innocents::start(&switch)?;
    model.command("cable off")?;
    let down = switch.wait_port("uplink", PortState::Connected, PATIENCE)?;
    let why = down.reason.unwrap_or_default();
    ensure!(why.contains("no link"), "{why}");
    innocents.go_on()?;
    model.command("cable on")?;
    switch.wait_port("uplink", PortState::Forwarding, PATIENCE)?;
    ping(&mut guest, 56, 5).context("after the cable was pulled")?;

    model.command("reset-pf 1000")?;
    switch.wait_port("uplink", PortState::Connecting, PATIENCE)?;
    innocents.go_on()?;
    switch.wait_port("uplink", PortState::Forwarding, PATIENCE)?;
    ping(&mut guest, 1400, 5).with_context(|| {
        let told = [
            model.command("show"),
            switch.command(&["port", "show", "uplink"]),
        ];
        format!("after the reset of the PF: {told:?}")
    })?;
    innocents.go_on()?;
    innocents.finish()?;
    equal_counters(&mut client, &switch, &mut model, &mut guest)?;

    client.quit()?;
    switch.stop()?;
    model.assert_clean(2)
}

/// A guest whose VFs are behind an IOMMU, with the switch's program in it: the VF of a card that has its PF in the guest too
/// (QEMU's igb), and one that was handed through alone (the model's).
fn guest_with_switch(model: &Model) -> Result<RunningGuest> {
    let igb = [
        "-netdev",
        "hubport,id=h0,hubid=0",
        "-device",
        "pcie-root-port,id=rp0,chassis=1",
        "-device",
        "igb,netdev=h0,bus=rp0",
    ];
    let machine = Machine {
        iommu: true,
        modules: vec!["vfio", "net", "igb"],
        programs: vec![testkit::ringway::binary()?],
        arguments: igb.map(str::to_owned).into(),
        ..Machine::new(Kernel::Old, model, 2)
    };
    machine.boot()
}

/// Runs a line that must fail, and must say why.
fn refused(guest: &mut RunningGuest, line: &str, why: &str) -> Result<()> {
    let text = guest.command(&format!("! {line} 2>&1"), COMMAND)?;
    ensure!(text.contains(why), "{line}: {why} is not in\n{text}");
    Ok(())
}

fn says(guest: &mut RunningGuest, line: &str, what: &[&str]) -> Result<String> {
    let text = guest.command(line, COMMAND)?;
    for part in what {
        ensure!(text.contains(part), "{line}: {part} is not in\n{text}");
    }
    Ok(text)
}

#[test]
#[ignore = "real peer: run by tests/run"]
fn the_operators_commands_bring_a_confined_switch_onto_the_kernels_vfio() -> Result<()> {
    require!(vf::available());
    let mut model = Model::start(
        &[
            "trust,spoofchk=off",
            "mac=02:00:00:00:00:02,trust,spoofchk=off",
        ],
        &[],
    )?;
    let mut guest = guest_with_switch(&model)?;
    // A card with a PF: QEMU's 82576.
    guest.command("pf=$(basename $(grep -l 0x10c9 /sys/bus/pci/devices/*/device | head -n 1 | xargs dirname)); echo $pf", COMMAND)?;
    says(
        &mut guest,
        "ringway nic list",
        &["8086:10c9", "PF, 0 of", "8086:10ed", "VF", "ixgbevf"],
    )?;
    says(
        &mut guest,
        "ringway nic vf create $pf 2 --dry-run",
        &["echo 2 > /sys/bus/pci/devices/"],
    )?;
    refused(&mut guest, "ringway nic vf create $pf 99", "not 99")?;
    says(&mut guest, "ringway nic vf create $pf 2", &["sriov_numvfs"])?;
    guest.command(
        "child=$(basename $(readlink -f /sys/bus/pci/devices/$pf/virtfn0)); echo $child",
        COMMAND,
    )?;
    says(&mut guest, "ringway nic list", &["PF, 2 of", "VF of 0000:"])?;
    says(&mut guest, "ringway nic bind $child", &["drivers_probe"])?;
    guest.command(
        "readlink /sys/bus/pci/devices/$child/driver | grep vfio-pci",
        COMMAND,
    )?;
    says(&mut guest, "ringway nic bind $child", &["nothing to do"])?;
    says(
        &mut guest,
        "ringway nic unbind $child",
        &["driver_override"],
    )?;
    guest.command(
        "! readlink /sys/bus/pci/devices/$child/driver | grep vfio-pci",
        COMMAND,
    )?;
    refused(&mut guest, "ringway nic bind $pf", "is no VF")?;
    // The model's VF, in use by the kernel, then handed over.
    guest.command(
        "vf=$(basename $(readlink -f /sys/class/net/eth0/device)); ip link set eth0 up",
        COMMAND,
    )?;
    refused(&mut guest, "ringway nic bind $vf", "ip link set eth0 down")?;
    guest.command("ip link set eth0 down", COMMAND)?;
    says(&mut guest, "ringway nic bind $vf", &["drivers_probe"])?;
    says(
        &mut guest,
        "ringway doctor",
        &["IOMMU", "groups handed to it"],
    )?;
    on_the_wire(&mut guest, &mut model)
}

/// The switch on the VF `$vf`, its peer the kernel's eth1.
fn on_the_wire(guest: &mut RunningGuest, model: &mut Model) -> Result<()> {
    let wait = "for i in $(seq 200); do ringway port show uplink 2>&1 | grep -q 'state *forwarding' && break; sleep 0.1; done";
    let start = format!(
        "mkdir -p /run/r; export RINGWAY_API=/run/r/api.sock; (ringway run --workers 1 --sandbox strict --port ixgbevf:uplink,device=$vf \
         --port vhost-user:blue,socket=/run/r/blue.sock >/tmp/log 2>&1; echo ended $? >>/tmp/log) & {wait}; cat /tmp/log"
    );
    guest.command(&start, COMMAND)?;
    says(
        guest,
        "ringway port show uplink",
        &["forwarding", "from wire", "82599", "10,000 Mbit/s"],
    )?;
    guest.command(
        "ip addr add 10.0.0.2/24 dev eth1 && ip link set eth1 up && sleep 3; ping -c 3 -W 1 10.0.0.1; true",
        COMMAND,
    )?;
    let received = |guest: &mut RunningGuest| -> Result<u64> {
        let text = guest.command("ringway stats --json", COMMAND)?;
        let at = text.find('{').context("JSON")?;
        let mut values =
            serde_json::Deserializer::from_str(&text[at..]).into_iter::<serde_json::Value>();
        let stats = values.next().context("JSON")??;
        stats["ports"]["uplink"]["received"]
            .as_u64()
            .context("a number")
    };
    let heard = received(guest)?;
    ensure!(heard > 0 && heard <= model.seen(0)?.rx_frames, "{heard}");
    // Another switch does not get the VF.
    let other = "export RINGWAY_API=/run/r/other.sock; ringway run --port ixgbevf:second,device=$vf >/dev/null 2>&1 & other=$!; \
         for i in $(seq 100); do RINGWAY_API=/run/r/other.sock ringway port list 2>&1 | grep second: && break; sleep 0.1; done; kill $other; \
         export RINGWAY_API=/run/r/api.sock";
    says(guest, other, &["another process uses this group"])?;
    // The PF forgets it; it comes back by itself.
    model.command("reset-pf 500")?;
    guest.command("sleep 2", COMMAND)?;
    guest.command(wait, COMMAND)?;
    says(
        guest,
        "ringway port show uplink",
        &["forwarding", "started over 1 times"],
    )?;
    guest.command("ping -c 8 -W 1 10.0.0.9; true", COMMAND)?;
    ensure!(received(guest)? > heard, "frames after the reset");
    guest.command("kill $(pidof ringway); for i in $(seq 100); do grep -q ended /tmp/log && break; sleep 0.1; done; cat /tmp/log; grep 'ended 0' /tmp/log", COMMAND)?;
    says(guest, "ringway nic unbind $vf", &["driver_override"])?;
    guest.command(
        "readlink /sys/bus/pci/devices/$vf/driver | grep ixgbevf",
        COMMAND,
    )?;
    model.assert_clean(2)
}
