//! A model of the 82599's VFs in a process of its own, and QEMU guests that have such VFs.
//!
//! `vfio-user-pci` came with QEMU 10.1, so QEMU and the guest's programs come from a newer Debian, unpacked beside the build by
//! `tests/testkit/vf-guest`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::assets;
use crate::process::{Launch, Process, run, target_dir};
use crate::qemu::{Cpio, READY, RunningGuest};
use crate::skip::{Missing, apt_candidate, root, tool};

/// A debootstrap and some packages over a slow line.
const MAKE: Duration = Duration::from_secs(1500);
const START: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(20);

/// All that these guests need of the machine.
pub fn available() -> Result<(), Missing> {
    root()?;
    tool("debootstrap", "debootstrap")?;
    tool("modprobe", "kmod")?;
    tool("cpio", "cpio")?;
    tool("xz", "xz-utils")?;
    tool("zstd", "zstd")?;
    apt_candidate("linux-image-amd64")
}

/// The folder of the newer Debian, made on first use.
fn rig() -> Result<PathBuf> {
    let kernel = assets::kernel_tree()?;
    assets::cached("vf-guest", |dir| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("vf-guest");
        run(
            [script.as_os_str(), dir.as_os_str(), kernel.as_os_str()],
            MAKE,
        )?;
        assets::unpack_kernel(&dir.join("new/vmlinuz"), &dir.join("new/vmlinux"))
    })
}

/// A library that makes a program of the guest write line by line (`LD_PRELOAD=/bin/libstdbuf.so _STDBUF_O=L`).
pub fn line_buffer() -> Result<PathBuf> {
    Ok(rig()?.join("root/usr/libexec/coreutils/libstdbuf.so"))
}

/// This machine's testpmd with its libraries, for [`Machine::others`]: `/debian12/ld.so --library-path /debian12
/// /debian12/dpdk-testpmd -d /debian12/pmd` runs it.
pub fn testpmd_of_debian_12() -> Result<Vec<(PathBuf, String)>> {
    const PROGRAM: &str = "/usr/bin/dpdk-testpmd";
    let all = std::fs::read_dir("/usr/lib/x86_64-linux-gnu/dpdk")?.flatten();
    let plugin = all
        .map(|entry| entry.path().join("librte_mempool_ring.so"))
        .find(|path| path.is_file())
        .context("dpdk-dev has no plugins")?;
    let buffer = PathBuf::from("/usr/libexec/coreutils/libstdbuf.so");
    let text = run(
        ["ldd".as_ref(), PROGRAM.as_ref(), plugin.as_os_str()],
        START,
    )?;
    // "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x..)", "/lib64/ld-linux-x86-64.so.2 (0x..)"
    let mut files: Vec<(PathBuf, String)> = text
        .lines()
        .filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next())
        .filter_map(|path| {
            let name = Path::new(path).file_name()?.to_str()?;
            Some((PathBuf::from(path), format!("debian12/{name}")))
        })
        .collect();
    files.sort();
    files.dedup();
    files.extend([
        (PROGRAM.into(), "debian12/dpdk-testpmd".to_owned()),
        (
            "/lib64/ld-linux-x86-64.so.2".into(),
            "debian12/ld.so".to_owned(),
        ),
        (plugin, "debian12/pmd/librte_mempool_ring.so".to_owned()),
        (buffer, "debian12/libstdbuf.so".to_owned()),
    ]);
    Ok(files)
}

/// Which kernel a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's.
    Old,
    /// The newer Debian's.
    New,
}

impl Kernel {
    fn folder(self) -> &'static str {
        match self {
            Kernel::Old => "old",
            Kernel::New => "new",
        }
    }
}

/// A running `vf-model serve`; ended on drop.
pub struct Model {
    process: Process,
    dir: tempfile::TempDir,
}

/// What the device counted for a VF, and what it complains about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Frames the VF received.
    pub rx_frames: u64,
    /// Frames it sent.
    pub tx_frames: u64,
    /// Bytes it received, without FCS.
    pub rx_bytes: u64,
    /// Bytes it sent, without FCS.
    pub tx_bytes: u64,
    /// DMA mappings it has.
    pub mappings: u64,
    /// Function-level and software resets.
    pub resets: u64,
    /// DMA faults.
    pub faults: u64,
    /// What no driver should do.
    pub misuses: u64,
}

impl Model {
    /// Serves a VF per policy (`mac=..,trust`, may be empty) with these further arguments.
    pub fn start(policies: &[&str], arguments: &[&str]) -> Result<Model> {
        Self::start_by(&[], policies, arguments)
    }

    /// The same, started by another program: `unshare -n` gives it a network namespace of its own.
    pub fn start_by(starter: &[&str], policies: &[&str], arguments: &[&str]) -> Result<Model> {
        let dir = tempfile::Builder::new().prefix("vf-").tempdir()?;
        let mut command: Vec<String> = starter.iter().map(|&word| word.to_owned()).collect();
        command.extend([
            binary("vf-model")?.display().to_string(),
            "serve".to_owned(),
        ]);
        for (vf, policy) in policies.iter().enumerate() {
            let comma = if policy.is_empty() { "" } else { "," };
            let path = dir.path().join(format!("vf{vf}"));
            command.extend([
                "--vf".to_owned(),
                format!("{}{comma}{policy}", path.display()),
            ]);
        }
        command.extend(arguments.iter().map(|&a| a.to_owned()));
        let mut process = Launch::new("vf-model", command).start()?;
        process.wait_for_text(0, START, "serving")?;
        Ok(Model { process, dir })
    }

    /// The socket of a VF.
    pub fn socket(&self, vf: usize) -> PathBuf {
        self.dir.path().join(format!("vf{vf}"))
    }

    /// Gives a command (see `vf-model serve --help`) and returns what it printed.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let mark = self.process.mark();
        self.process.write(&format!("{line}\n"))?;
        let ended = |text: &str| {
            text.lines()
                .any(|line| line == "ok" || line.starts_with("error: "))
        };
        let text = self.process.wait_for(mark, ANSWER, ended)?;
        ensure!(text.ends_with("ok\n"), "vf-model: {line}: {text}");
        Ok(text)
    }

    /// What the device saw of a VF.
    pub fn seen(&mut self, vf: usize) -> Result<Seen> {
        let text = self.command("show")?;
        let start = format!("vf={vf} rx_frames=");
        let line = text
            .lines()
            .find(|line| line.starts_with(&start))
            .with_context(|| text.clone())?;
        let number = |key: &str| -> Result<u64> {
            let value = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            Ok(value
                .with_context(|| format!("no {key} in {line}"))?
                .parse()?)
        };
        Ok(Seen {
            rx_frames: number("rx_frames")?,
            tx_frames: number("tx_frames")?,
            rx_bytes: number("rx_bytes")?,
            tx_bytes: number("tx_bytes")?,
            mappings: number("mappings")?,
            resets: number("resets")?,
            faults: number("faults")?,
            misuses: number("misuses")?,
        })
    }

    /// No driver did anything that a device would not forgive.
    pub fn assert_clean(&mut self, vfs: usize) -> Result<()> {
        for vf in 0..vfs {
            let seen = self.seen(vf)?;
            ensure!(
                seen.faults == 0 && seen.misuses == 0,
                "{}",
                self.command("show")?
            );
        }
        Ok(())
    }

    /// The process, for its pid and signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The release build of a program of the model's package, else the debug build.
pub fn binary(name: &str) -> Result<PathBuf> {
    let built = ["release", "debug"].map(|profile| target_dir().join(profile).join(name));
    let found = built.iter().find(|path| path.is_file());
    found.cloned().with_context(|| {
        format!(
            "{} does not exist: cargo build --release -p vf-model",
            built[0].display()
        )
    })
}

/// A QEMU guest with VFs.
pub struct Machine {
    /// Its kernel.
    pub kernel: Kernel,
    /// The sockets of its VFs, in the order of their PCI addresses from 0000:00:02.0 (03 behind an IOMMU).
    pub sockets: Vec<PathBuf>,
    /// Behind an emulated Intel IOMMU, with page-granular mappings.
    pub iommu: bool,
    /// Sets of modules loaded at boot: `net`, `vfio`, `igb`.
    pub modules: Vec<&'static str>,
    /// Programs copied to /bin of the guest.
    pub programs: Vec<PathBuf>,
    /// Other files, and where in the guest they go; see [`testpmd_of_debian_12`].
    pub others: Vec<(PathBuf, String)>,
    /// Further arguments of QEMU.
    pub arguments: Vec<String>,
    /// Shell lines run before the guest takes commands.
    pub script: String,
}

impl Machine {
    /// A guest with the VFs of `model` and the modules of a network driver.
    pub fn new(kernel: Kernel, model: &Model, vfs: usize) -> Self {
        Self {
            kernel,
            sockets: (0..vfs).map(|vf| model.socket(vf)).collect(),
            iommu: false,
            modules: vec!["net"],
            programs: Vec::new(),
            others: Vec::new(),
            arguments: Vec::new(),
            script: String::new(),
        }
    }

    /// Starts the guest and waits until it takes commands.
    pub fn boot(&self) -> Result<RunningGuest> {
        let rig = rig()?;
        let own = rig.join(self.kernel.folder());
        let dir = tempfile::tempdir()?;
        let initramfs = dir.path().join("initramfs");
        // The archive of programs is the same for all; the second one, concatenated, is this guest's own.
        let mut bytes = std::fs::read(rig.join("guest.cpio"))?;
        bytes.extend(self.files(&own.join("modules"))?);
        std::fs::write(&initramfs, bytes)?;
        let command = self.command_line(&rig, &own.join("vmlinux"), &initramfs);
        let process = Launch::new("qemu-vf", command).start()?;
        let mut guest = RunningGuest::new(process, dir);
        guest.wait_booted()?;
        Ok(guest)
    }

    fn command_line(&self, rig: &Path, kernel: &Path, initramfs: &Path) -> Vec<String> {
        let root = rig.join("root");
        let at = |path: &str| root.join(path).display().to_string();
        let libraries = "usr/lib/x86_64-linux-gnu";
        // The newer Debian's own loader and libraries: nothing of it is installed.
        let mut line = vec![
            at("usr/lib64/ld-linux-x86-64.so.2"),
            "--library-path".to_owned(),
            format!(
                "{}:{}",
                at(libraries),
                at(&format!("{libraries}/pulseaudio"))
            ),
            at("usr/bin/qemu-system-x86_64"),
        ];
        let append = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check random.trust_cpu=on";
        let iommu = if self.iommu {
            " intel_iommu=on iommu.strict=1"
        } else {
            ""
        };
        let options: [(&str, String); 13] = [
            ("-L", at("usr/share/qemu")),
            ("-L", at("usr/share/seabios")),
            ("-accel", "tcg,thread=multi,tb-size=256".to_owned()),
            ("-cpu", "Nehalem,+rdtscp,-vmx,+rdrand,+x2apic".to_owned()),
            ("-smp", "2".to_owned()),
            ("-machine", "q35,memory-backend=mem".to_owned()),
            ("-m", "1024".to_owned()),
            (
                "-object",
                "memory-backend-memfd,id=mem,size=1024M,share=on".to_owned(),
            ),
            ("-display", "none".to_owned()),
            ("-serial", "stdio".to_owned()),
            ("-kernel", kernel.display().to_string()),
            ("-initrd", initramfs.display().to_string()),
            ("-append", format!("{append}{iommu}")),
        ];
        line.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        line.extend(
            options
                .into_iter()
                .flat_map(|(key, value)| [key.to_owned(), value]),
        );
        if self.iommu {
            line.extend(["-device", "intel-iommu,intremap=on,caching-mode=on"].map(str::to_owned));
        }
        for socket in &self.sockets {
            let path = socket.display();
            line.push("-device".to_owned());
            line.push(format!(
                r#"{{"driver":"vfio-user-pci","socket":{{"path":"{path}","type":"unix"}}}}"#
            ));
        }
        line.extend(self.arguments.iter().cloned());
        line
    }

    fn files(&self, modules: &Path) -> Result<Vec<u8>> {
        let mut archive = Cpio::default();
        // Opened by the kernel for init before anything is mounted.
        archive.add("dev/console", 0o020_600, (5, 1), &[]);
        let mut load = String::new();
        for set in &self.modules {
            let names = std::fs::read_to_string(modules.join(set))
                .with_context(|| format!("set of modules {set}"))?;
            for name in names.lines() {
                let bytes = std::fs::read(modules.join(name))?;
                archive.add(&format!("modules/{name}"), 0o100_644, (0, 0), &bytes);
                load += &format!("insmod /modules/{name}\n");
            }
        }
        for program in &self.programs {
            let Some(name) = program.file_name() else {
                bail!("{} is no program", program.display());
            };
            let bytes = std::fs::read(program).with_context(|| program.display().to_string())?;
            archive.add(
                &format!("bin/{}", name.to_string_lossy()),
                0o100_755,
                (0, 0),
                &bytes,
            );
        }
        archive.add("debian12", 0o040_755, (0, 0), &[]);
        archive.add("debian12/pmd", 0o040_755, (0, 0), &[]);
        for (from, to) in &self.others {
            let bytes = std::fs::read(from).with_context(|| from.display().to_string())?;
            archive.add(to, 0o100_755, (0, 0), &bytes);
        }
        let script = format!(
            "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/usr/bin:/bin LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu/dpdk/pmds-26.0\n\
             ip() {{ /usr/bin/ip \"$@\"; }} # busybox would take its own\nmount -t proc none /proc\nmount -t sysfs none /sys\nmount -t devtmpfs none /dev\nmount -t tmpfs none /run\nmount -t tmpfs none /tmp\n\
             {load}ip link set lo up\n{extra}\necho '{READY}booted'\nwhile read -r line; do eval \"$line\"; echo \"{READY}$?\"; done\nreboot -f\n",
            extra = self.script,
        );
        archive.add("init", 0o100_755, (0, 0), script.as_bytes());
        Ok(archive.finish())
    }
}
