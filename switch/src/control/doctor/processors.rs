//! Checks of the CPUs that workers get.

use super::super::cpu::{HostCpus, cgroup_files, parse_list};
use super::super::spec::list;
use super::{Check, Host};

pub(super) fn cpuset(host: &Host<'_>) -> Check {
    let HostCpus {
        allowed, online, ..
    } = &host.cpus;
    let found = format!("{} of {}", list(allowed), list(online));
    match allowed.len() {
        0 => Check::blocks(
            "cpuset",
            "no CPU at all",
            "give this cgroup CPUs: echo 0-1 > cpuset.cpus",
        ),
        1 => Check::advice(
            "cpuset",
            found,
            "a worker that does not share its CPU with everything else",
            "give this cgroup a second CPU, e.g. docker run --cpuset-cpus, systemd AllowedCPUs=; until then idle = \"adaptive\"",
        ),
        _ => Check::ok("cpuset", found),
    }
}

pub(super) fn cpu_quota(host: &Host<'_>) -> Check {
    // A quota of any cgroup above counts too.
    let quotas = cgroup_files(host.root, "cpu", "cpu.max", "cpu.cfs_quota_us");
    match quotas
        .iter()
        .find(|text| !text.starts_with("max") && *text != "-1")
    {
        None => Check::ok("cpu quota", "none"),
        Some(text) => Check::advice(
            "cpu quota",
            format!("{text} (µs, period)"),
            "the kernel stops a polling worker for tens of milliseconds whenever the quota is spent",
            "limit by CPUs, not by time: docker run --cpuset-cpus in place of --cpus, systemd AllowedCPUs= in place of CPUQuota=",
        ),
    }
}

pub(super) fn isolated(host: &Host<'_>) -> Check {
    let name = "isolated CPUs";
    if host
        .workers
        .iter()
        .all(|cpu| host.cpus.isolated.contains(cpu))
    {
        return Check::ok(name, list(&host.cpus.isolated));
    }
    let found = if host.cpus.isolated.is_empty() {
        "none".to_owned()
    } else {
        format!("{} only", list(&host.cpus.isolated))
    };
    let workers = host.worker_list();
    let parameters = format!("isolcpus={workers} nohz_full={workers} rcu_nocbs={workers}");
    Check::advice(
        name,
        found,
        "no other task ever takes a worker's CPU: shorter worst-case latency",
        host.boot_with(&parameters),
    )
}

pub(super) fn nohz_full(host: &Host<'_>) -> Check {
    let set = host
        .text("sys/devices/system/cpu/nohz_full")
        .as_deref()
        .and_then(parse_list)
        .unwrap_or_default();
    if host.workers.iter().all(|cpu| set.contains(cpu)) {
        return Check::ok("nohz_full", list(&set));
    }
    let repair = host.boot_with(&format!("nohz_full={}", host.worker_list()));
    Check::advice(
        "nohz_full",
        "not for the workers",
        "no timer tick on a worker's CPU: up to 1000 interruptions a second less",
        repair,
    )
}

pub(super) fn rcu_nocbs(host: &Host<'_>) -> Check {
    // nohz_full implies it.
    let set = ["rcu_nocbs", "nohz_full"]
        .into_iter()
        .find_map(|name| host.boot(name))
        .unwrap_or_default();
    let covered = set == "all"
        || parse_list(&set).is_some_and(|set| host.workers.iter().all(|cpu| set.contains(cpu)));
    if covered {
        return Check::ok("rcu_nocbs", set);
    }
    let repair = host.boot_with(&format!("rcu_nocbs={}", host.worker_list()));
    Check::advice(
        "rcu_nocbs",
        "not for the workers",
        "the kernel frees memory on other CPUs: fewer stalls of some 10 µs",
        repair,
    )
}

pub(super) fn siblings(host: &Host<'_>) -> Check {
    let shared = host
        .cpus
        .siblings
        .iter()
        .find(|core| host.workers.iter().any(|cpu| core.contains(cpu)));
    match shared {
        None => Check::ok("SMT siblings", "none beside the workers"),
        Some(core) => {
            let off: Vec<String> = core
                .iter()
                .filter(|cpu| !host.workers.contains(cpu))
                .map(|cpu| format!("echo 0 > /sys/devices/system/cpu/cpu{cpu}/online"))
                .collect();
            let repair = if off.is_empty() {
                "put the workers on different cores".to_owned()
            } else {
                off.join("; ")
            };
            Check::advice(
                "SMT siblings",
                format!("{} share one core", list(core)),
                "the whole core for the worker, not what its sibling leaves",
                repair,
            )
        }
    }
}

pub(super) fn governor(host: &Host<'_>) -> Check {
    let of = |cpu: &usize| {
        host.text(&format!(
            "sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"
        ))
    };
    match host.workers.iter().find_map(|cpu| {
        of(cpu)
            .filter(|governor| governor != "performance")
            .map(|governor| (cpu, governor))
    }) {
        None => Check::ok("frequency", "not scaled down"),
        Some((cpu, governor)) => Check::advice(
            "frequency",
            format!("governor {governor} on CPU {cpu}"),
            "the same speed always: no slow start after a pause",
            format!("echo performance > /sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"),
        ),
    }
}

pub(super) fn tsc(host: &Host<'_>) -> Check {
    let source = host
        .text("sys/devices/system/clocksource/clocksource0/current_clocksource")
        .unwrap_or_default();
    if host.has("constant_tsc") && host.has("nonstop_tsc") {
        return Check::ok("TSC", format!("invariant, clocksource {source}"));
    }
    let repair = "run on a CPU (or VM type) that has an invariant TSC, in QEMU: -cpu host,+invtsc";
    Check::advice(
        "TSC",
        "not invariant",
        "cycles and latencies that can be trusted",
        repair,
    )
}

pub(super) fn vector(host: &Host<'_>) -> Check {
    match ["avx512vl", "avx2", "sse4_2"]
        .iter()
        .find(|level| host.has(level))
    {
        Some(&level @ ("avx512vl" | "avx2")) => Check::ok("vector unit", level),
        found => Check::advice(
            "vector unit",
            found.map_or("unknown", |level| level),
            "faster lookups and copies",
            "in a VM, hand the host's CPU through: -cpu host",
        ),
    }
}
