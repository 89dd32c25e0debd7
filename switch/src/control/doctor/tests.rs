//! A good host, and one broken in each of the ways that `doctor` knows.

use super::*;

const GOOD: &[(&str, &str)] = &[
    ("proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"),
    (
        "proc/cmdline",
        "quiet isolcpus=2-3 nohz_full=2-3 rcu_nocbs=2-3\n",
    ),
    (
        "proc/cpuinfo",
        "processor : 0\nflags\t\t: fpu constant_tsc nonstop_tsc avx2 avx512vl\n",
    ),
    (
        "proc/self/limits",
        "Limit   Soft Limit  Hard Limit  Units\nMax open files   65536   65536   files\nMax locked memory   unlimited   unlimited   bytes\n",
    ),
    ("proc/self/status", "Cpus_allowed_list:\t0-1\nSeccomp:\t0\n"),
    ("proc/self/cgroup", "0::/ringway\n"),
    ("proc/sys/vm/unprivileged_userfaultfd", "0\n"),
    ("proc/sys/fs/aio-nr", "64\n"),
    ("proc/sys/fs/aio-max-nr", "65536\n"),
    ("sys/fs/cgroup/ringway/cpuset.cpus.effective", "0-3\n"),
    ("sys/fs/cgroup/ringway/cpu.max", "max 100000\n"),
    ("sys/fs/cgroup/ringway/hugetlb.2MB.max", "max\n"),
    ("sys/devices/system/cpu/online", "0-3\n"),
    ("sys/devices/system/cpu/isolated", "2-3\n"),
    ("sys/devices/system/cpu/nohz_full", "2-3\n"),
    (
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor",
        "performance\n",
    ),
    (
        "sys/devices/system/clocksource/clocksource0/current_clocksource",
        "tsc\n",
    ),
    (
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        "1024\n",
    ),
    (
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
        "1000\n",
    ),
    (
        "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
        "4\n",
    ),
    (
        "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
        "4\n",
    ),
    (
        "sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "always within_size [advise] never deny force\n",
    ),
    ("etc/default/grub", "GRUB_CMDLINE_LINUX=\"\"\n"),
];

/// The good host with some files changed; `None` removes one.
fn host(changes: &[(&str, Option<&str>)]) -> Vec<Check> {
    let root = tempfile::tempdir().expect("a directory");
    let kept = GOOD
        .iter()
        .filter(|(path, _)| !changes.iter().any(|(changed, _)| changed == path));
    let changed = changes
        .iter()
        .filter_map(|(path, text)| Some((*path, (*text)?)));
    for (path, text) in kept.copied().chain(changed) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a file")).expect("made");
        fs::write(path, text).expect("written");
    }
    examine(root.path(), &[])
}

/// The one check that is not fine, after these changes.
fn broken(changes: &[(&str, Option<&str>)]) -> Check {
    let mut bad: Vec<Check> = host(changes)
        .into_iter()
        .filter(|check| check.verdict != Verdict::Ok)
        .collect();
    assert_eq!(bad.len(), 1, "{bad:#?}");
    bad.remove(0)
}

#[test]
fn finds_nothing_wrong_with_a_prepared_host() {
    let bad: Vec<Check> = host(&[])
        .into_iter()
        .filter(|check| check.verdict != Verdict::Ok)
        .collect();
    assert_eq!(bad, []);
}

const SECCOMP_ON: &str = "Cpus_allowed_list:\t0-1\nSeccomp:\t2\n";
const FEW_FILES: &str =
    "Max open files   1024   4096   files\nMax locked memory   unlimited   unlimited   bytes\n";
const LITTLE_LOCK: &str =
    "Max open files   65536   65536   files\nMax locked memory   8388608   8388608   bytes\n";

/// A check, the file that breaks the host, what is in it, and a part of the command that repairs it.
type Case = (
    &'static str,
    &'static str,
    Option<&'static str>,
    &'static str,
);

const BROKEN: &[Case] = &[
    (
        "kernel",
        "proc/sys/kernel/osrelease",
        Some("5.4.0-150-generic"),
        "5.11",
    ),
    (
        "cpu quota",
        "sys/fs/cgroup/ringway/cpu.max",
        Some("50000 100000"),
        "--cpuset-cpus",
    ),
    (
        "nohz_full",
        "sys/devices/system/cpu/nohz_full",
        Some("(null)"),
        "nohz_full=2 ",
    ),
    ("rcu_nocbs", "proc/cmdline", Some("quiet"), "rcu_nocbs=2 "),
    (
        "SMT siblings",
        "sys/devices/system/cpu/cpu2/topology/thread_siblings_list",
        Some("2,3"),
        "cpu3/online",
    ),
    (
        "frequency",
        "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor",
        Some("powersave"),
        "echo performance > /sys",
    ),
    (
        "2 MiB hugepages",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
        Some("0"),
        "vm.nr_hugepages=2048",
    ),
    (
        "1 GiB hugepages",
        "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
        Some("0"),
        "echo 5 > /sys",
    ),
    (
        "hugetlb cgroup",
        "sys/fs/cgroup/ringway/hugetlb.2MB.max",
        Some("0"),
        "hugetlb.2MB.max",
    ),
    (
        "transparent hugepages",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled",
        Some("always [never]"),
        "within_size",
    ),
    (
        "memlock limit",
        "proc/self/limits",
        Some(LITTLE_LOCK),
        "ulimit -l unlimited",
    ),
    (
        "open files limit",
        "proc/self/limits",
        Some(FEW_FILES),
        "ulimit -n",
    ),
    (
        "userfaultfd",
        "proc/sys/vm/unprivileged_userfaultfd",
        None,
        "CONFIG_USERFAULTFD",
    ),
    ("seccomp", "proc/self/status", Some(SECCOMP_ON), "seccomp"),
    (
        "kernel AIO",
        "proc/sys/fs/aio-nr",
        Some("65500"),
        "sysctl -w fs.aio-max-nr=262144",
    ),
    ("kernel AIO", "proc/sys/fs/aio-max-nr", None, "CONFIG_AIO"),
    ("TSC", "proc/cpuinfo", Some("flags : avx2"), "invtsc"),
    (
        "vector unit",
        "proc/cpuinfo",
        Some("flags : constant_tsc nonstop_tsc sse4_2"),
        "-cpu host",
    ),
];

#[test]
fn each_broken_host_gets_its_advice_and_its_command() {
    for (name, path, text, command) in BROKEN {
        let check = broken(&[(path, *text)]);
        assert_eq!(
            (check.name.as_str(), check.verdict),
            (*name, Verdict::Advice),
            "{check:?}"
        );
        assert!(check.gain.is_some(), "{check:?}");
        assert!(
            check
                .repair
                .as_ref()
                .is_some_and(|repair| repair.contains(command)),
            "{check:?}"
        );
    }
}

#[test]
fn without_isolated_cpus_it_names_all_three_boot_parameters_in_the_way_of_the_distribution() {
    let changes = [
        ("sys/devices/system/cpu/isolated", None),
        ("proc/self/status", Some("Cpus_allowed_list:\t0-3\n")),
    ];
    let find = |checks: Vec<Check>| {
        checks
            .into_iter()
            .find(|check| check.name == "isolated CPUs")
            .expect("checked")
    };
    let parameters = "isolcpus=1 nohz_full=1 rcu_nocbs=1";
    let debian = find(host(&changes)).repair.expect("a command");
    assert_eq!(
        debian,
        format!(
            "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{parameters} /' /etc/default/grub && update-grub && reboot"
        )
    );
    let other = [changes[0], changes[1], ("etc/default/grub", None)];
    let other = find(host(&other)).repair.expect("a command");
    assert_eq!(
        other,
        format!("add to the kernel's command line and reboot: {parameters}")
    );
}

#[test]
fn a_single_cpu_works_and_gets_advice() {
    let checks = host(&[("sys/fs/cgroup/ringway/cpuset.cpus.effective", Some("2"))]);
    let cpuset = checks
        .iter()
        .find(|check| check.name == "cpuset")
        .expect("checked");
    assert_eq!(cpuset.verdict, Verdict::Advice);
    assert!(checks.iter().all(|check| check.verdict != Verdict::Blocks));
}

#[test]
fn only_an_ancient_kernel_or_no_cpu_prevents_running() {
    assert_eq!(
        broken(&[("proc/sys/kernel/osrelease", Some("3.10.0-1160"))]).verdict,
        Verdict::Blocks
    );
    let nothing = tempfile::tempdir().expect("a directory");
    let blocked: Vec<String> = examine(nothing.path(), &[])
        .into_iter()
        .filter(|check| check.verdict == Verdict::Blocks)
        .map(|check| check.name)
        .collect();
    assert_eq!(blocked, ["kernel", "cpuset"]);
}

#[test]
fn this_host_can_run_ringway() {
    let checks = examine(Path::new("/"), &[]);
    assert!(
        checks.iter().all(|check| check.verdict != Verdict::Blocks),
        "{checks:#?}"
    );
}
