//! A QEMU guest in software emulation: Debian's kernel, busybox, and a virtio-net device whose backend is a vhost-user socket.
//!
//! The guest boots in some seconds, sets its interface up and then takes commands over its serial console.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::assets;
use crate::process::{Launch, Process};
use crate::skip::{Missing, apt_candidate, file, tool};

/// 2-3 s on a quiet machine; two guests boot beside a polling switch on two cores.
const BOOT: Duration = Duration::from_secs(180);
/// What the guest prints before it takes the next command.
pub(crate) const READY: &str = "@@ ";
const BUSYBOX: &str = "/bin/busybox";

/// In the order of their dependencies: an initramfs has no modules.dep.
const MODULES: [&str; 9] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "net/packet/af_packet.ko",
];

/// How to start a guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// QEMU listens and the switch connects; otherwise QEMU connects, again and again.
    pub server: bool,
    /// Last byte of its MAC address 02:00:00:00:00:xx and of its address 10.0.0.xx/24.
    pub station: u8,
    /// MTU of its interface.
    pub mtu: u16,
    /// Queue pairs; the guest gets as many CPUs.
    pub queues: u16,
    /// Options appended to the device, like `packed=on`.
    pub device: String,
    /// Shell lines run before the guest takes commands.
    pub script: String,
}

impl Guest {
    /// A guest with one queue pair and MTU 1500 that connects to `socket`.
    pub fn new(socket: impl AsRef<Path>, station: u8) -> Self {
        let socket = socket.as_ref().to_path_buf();
        Self {
            socket,
            server: false,
            station,
            mtu: 1500,
            queues: 1,
            device: String::new(),
            script: String::new(),
        }
    }

    /// Its IP address.
    pub fn address(&self) -> String {
        format!("10.0.0.{}", self.station)
    }

    /// Starts the guest; does not wait until it has booted.
    pub fn launch(&self) -> Result<RunningGuest> {
        let kernel = assets::kernel()?;
        let dir = tempfile::tempdir()?;
        let initramfs = dir.path().join("initramfs");
        std::fs::write(&initramfs, self.initramfs(&kernel.modules)?)?;
        let command = self.command_line(&kernel.vmlinux, &initramfs);
        let process = Launch::new(&format!("qemu-{}", self.station), command).start()?;
        Ok(RunningGuest { process, _dir: dir })
    }

    /// Starts the guest and waits until it takes commands.
    pub fn boot(&self) -> Result<RunningGuest> {
        let mut guest = self.launch()?;
        guest.wait_booted()?;
        Ok(guest)
    }

    fn command_line(&self, kernel: &Path, initramfs: &Path) -> Vec<String> {
        let Self {
            station,
            queues,
            device,
            ..
        } = self;
        let socket = self.socket.display();
        let role = if self.server {
            ",server=on"
        } else {
            ",reconnect=1"
        };
        let multi = if *queues > 1 { ",mq=on" } else { "" };
        let append = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check random.trust_cpu=on";
        let mut line: Vec<String> = [
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
        ]
        .map(str::to_owned)
        .into();
        let options: [(&str, String); 13] = [
            ("-display", "none".to_owned()),
            ("-serial", "stdio".to_owned()),
            ("-accel", "tcg,thread=multi,tb-size=256".to_owned()),
            ("-cpu", "Nehalem,+rdtscp,-vmx,+rdrand,+x2apic".to_owned()),
            ("-smp", queues.to_string()),
            ("-machine", "q35,memory-backend=mem".to_owned()),
            ("-m", "256".to_owned()),
            (
                "-object",
                "memory-backend-memfd,id=mem,size=256M,share=on".to_owned(),
            ),
            ("-kernel", kernel.display().to_string()),
            ("-initrd", initramfs.display().to_string()),
            ("-append", append.to_owned()),
            ("-chardev", format!("socket,id=c0,path={socket}{role}")),
            (
                "-netdev",
                format!("vhost-user,id=n0,chardev=c0,queues={queues}"),
            ),
        ];
        line.extend(
            options
                .into_iter()
                .flat_map(|(key, value)| [key.to_owned(), value]),
        );
        // vectors=0, interrupts by a line: with MSI-X, vhost and no KVM, QEMU 7.2 calls a vector of irqfds it never made
        // (SIGSEGV in msix_set_vector_notifiers when the driver starts; mended in 9.1).
        line.push("-device".to_owned());
        line.push(format!(
            "virtio-net-pci,netdev=n0,mac=02:00:00:00:00:{station:02x},mrg_rxbuf=on,vectors=0,romfile={multi}{device}"
        ));
        line
    }

    fn initramfs(&self, modules: &Path) -> Result<Vec<u8>> {
        let busybox = std::fs::read(BUSYBOX).context("the guest's programs")?;
        let mut archive = Cpio::default();
        for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
            archive.add(folder, 0o040_755, (0, 0), &[]);
        }
        // Opened by the kernel for init before anything is mounted.
        archive.add("dev/console", 0o020_600, (5, 1), &[]);
        archive.add("bin/busybox", 0o100_755, (0, 0), &busybox);
        let mut load = String::new();
        for module in MODULES {
            // One that is built in has no file.
            let Ok(bytes) = std::fs::read(modules.join(module)) else {
                continue;
            };
            let name = format!("modules/{}", module.rsplit('/').next().unwrap_or(module));
            archive.add(&name, 0o100_644, (0, 0), &bytes);
            load += &format!("insmod /{name}\n");
        }
        let script = format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nmount -t proc none /proc\nmount -t sysfs none /sys\n\
             mount -t devtmpfs none /dev\n{load}ip link set lo up\nip link set eth0 mtu {mtu}\nip addr add {address}/24 dev eth0\n\
             ip link set eth0 up\n{extra}\necho '{READY}booted'\nwhile read -r line; do eval \"$line\"; echo \"{READY}$?\"; done\nreboot -f\n",
            mtu = self.mtu,
            address = self.address(),
            extra = self.script,
        );
        archive.add("init", 0o100_755, (0, 0), script.as_bytes());
        Ok(archive.finish())
    }
}

/// All that a guest needs of the machine.
pub fn available() -> Result<(), Missing> {
    tool("qemu-system-x86_64", "qemu-system-x86")?;
    tool("xz", "xz-utils")?;
    file(BUSYBOX, "busybox-static")?;
    apt_candidate("linux-image-amd64")
}

/// A booted guest; killed on drop.
pub struct RunningGuest {
    process: Process,
    _dir: tempfile::TempDir,
}

impl RunningGuest {
    /// A guest whose files live in `dir`.
    pub(crate) fn new(process: Process, dir: tempfile::TempDir) -> Self {
        Self { process, _dir: dir }
    }

    /// Waits until the guest takes commands.
    pub fn wait_booted(&mut self) -> Result<()> {
        self.process
            .wait_for_text(0, BOOT, &format!("{READY}booted"))
            .map(drop)
    }

    /// Runs a shell line in the guest and returns what it printed; an error if it failed.
    pub fn command(&mut self, line: &str, within: Duration) -> Result<String> {
        let mark = self.process.mark();
        self.process.write(&format!("{line}\n"))?;
        let done = |text: &str| status(text).is_some();
        let text = self
            .process
            .wait_for(mark, within, done)
            .with_context(|| format!("guest: {line}"))?;
        match status(&text) {
            Some(0) => Ok(text),
            status => bail!("guest: `{line}` ended with {status:?}:\n{text}"),
        }
    }

    /// Pings `address` `count` times with `size` bytes; every one must be answered.
    ///
    /// One at a time: busybox has room for three or four jumbo answers, and a guest that the host did not let run for half
    /// a second finds more than that at once.
    pub fn ping(&mut self, address: &str, size: u16, count: u16) -> Result<()> {
        let within = Duration::from_secs(30 + 2 * u64::from(count));
        let one = format!("ping -c 1 -W 10 -s {size} {address}");
        let all = format!(
            "i=0; while [ $i -lt {count} ] && {one}; do i=$((i+1)); done; [ $i = {count} ]"
        );
        let text = self.command(&all, within)?;
        let answers = text
            .matches("1 packets transmitted, 1 packets received")
            .count();
        ensure!(
            answers == usize::from(count),
            "{answers} of {count} pings answered:\n{text}"
        );
        Ok(())
    }

    /// The process, for its pid, console and signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The exit status the guest printed behind a whole marker line.
fn status(text: &str) -> Option<u8> {
    let (_, rest) = text.split_once(&format!("\n{READY}"))?;
    let (status, _) = rest.split_once(['\r', '\n'])?;
    status.parse().ok()
}

/// A cpio archive in the format the kernel unpacks (`newc`), made without root although it holds a device node.
#[derive(Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    files: u32,
}

impl Cpio {
    pub(crate) fn add(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.files += 1;
        let links = 1;
        let name_size = name.len() as u32 + 1;
        let fields = [
            self.files,
            mode,
            0,
            0,
            links,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_status_behind_a_command_and_not_the_echo_of_it() {
        assert_eq!(status("echo '@@ 7'\r\nhello\r\n@@ 0\r\n"), Some(0));
        assert_eq!(status("false\r\n@@ 1\r\n"), Some(1));
        assert_eq!(status("sleep 1\r\n@@ "), None);
    }

    #[test]
    fn an_archive_is_padded_to_words_and_ends_in_its_trailer() {
        let mut archive = Cpio::default();
        archive.add("init", 0o100_755, (0, 0), b"abc");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            text.starts_with("07070100000001000081ed") && text.ends_with("TRAILER!!!\0\0\0\0"),
            "{text:?}"
        );
    }
}
