//! Checks of memory and of what the process may do with it.

use super::super::cpu::cgroup_file;
use super::{Check, Host};

pub(super) fn hugepages_2m(host: &Host<'_>) -> Check {
    let at = "sys/kernel/mm/hugepages/hugepages-2048kB";
    let free = host.number(&format!("{at}/free_hugepages")).unwrap_or(0);
    let all = host.number(&format!("{at}/nr_hugepages")).unwrap_or(0);
    let found = format!("{free} free of {all}");
    if free >= 256 {
        return Check::ok("2 MiB hugepages", found);
    }
    Check::advice(
        "2 MiB hugepages",
        found,
        "guests on hugepages: fewer TLB misses, and a guest that takes its memory away stalls others for less long",
        format!("sysctl -w vm.nr_hugepages={}", all + 1024),
    )
}

pub(super) fn hugepages_1g(host: &Host<'_>) -> Check {
    let at = "sys/kernel/mm/hugepages/hugepages-1048576kB";
    match (
        host.number(&format!("{at}/free_hugepages")),
        host.number(&format!("{at}/nr_hugepages")),
    ) {
        (Some(free), Some(all)) if free > 0 => {
            Check::ok("1 GiB hugepages", format!("{free} free of {all}"))
        }
        (Some(_), Some(all)) => Check::advice(
            "1 GiB hugepages",
            format!("none free of {all}"),
            "guests with gigabytes of buffers in one region: the fewest TLB misses",
            format!("echo {} > /{at}/nr_hugepages", all + 1),
        ),
        _ => Check::ok("1 GiB hugepages", "not on this CPU; 2 MiB pages serve"),
    }
}

pub(super) fn hugetlb_limit(host: &Host<'_>) -> Check {
    let limit = cgroup_file(
        host.root,
        "hugetlb",
        "hugetlb.2MB.max",
        "hugetlb.2MB.limit_in_bytes",
    );
    match limit.as_deref().map(str::trim) {
        // Version 1 writes "no limit" as the largest number of whole pages.
        Some(text) if text != "max" && text.parse::<u64>().is_ok_and(|bytes| bytes < 1 << 60) => {
            Check::advice(
                "hugetlb cgroup",
                format!("2 MiB pages limited to {text} bytes"),
                "hugepages that the kernel shows as free and then refuses end in SIGBUS",
                "raise it: echo max > hugetlb.2MB.max in this cgroup, Kubernetes: limits: hugepages-2Mi",
            )
        }
        _ => Check::ok("hugetlb cgroup", "no limit"),
    }
}

pub(super) fn transparent(host: &Host<'_>) -> Check {
    let shmem = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let text = host.text(shmem).unwrap_or_default();
    let chosen = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("unknown", |(word, _)| word);
    match chosen {
        "always" | "within_size" | "advise" | "force" => {
            Check::ok("transparent hugepages", format!("shared memory: {chosen}"))
        }
        _ => Check::advice(
            "transparent hugepages",
            format!("shared memory: {chosen}"),
            "guests without hugepages (memfd) may get 2 MiB mappings",
            format!("echo within_size > /{shmem}"),
        ),
    }
}

pub(super) fn memlock(host: &Host<'_>) -> Check {
    match host.limit("Max locked memory") {
        Some(Some(bytes)) if bytes < 1 << 30 => Check::advice(
            "memlock limit",
            format!("{} KiB", bytes >> 10),
            "guests' 4 KiB pages cannot be swapped under a worker; a device can be mapped through VFIO",
            "ulimit -l unlimited; systemd: LimitMEMLOCK=infinity; docker run --ulimit memlock=-1",
        ),
        Some(Some(bytes)) => Check::ok("memlock limit", format!("{} MiB", bytes >> 20)),
        Some(None) => Check::ok("memlock limit", "unlimited"),
        None => Check::ok("memlock limit", "unknown"),
    }
}

pub(super) fn userfaultfd(host: &Host<'_>) -> Check {
    if host
        .root
        .join("proc/sys/vm/unprivileged_userfaultfd")
        .exists()
    {
        return Check::ok("userfaultfd", "in the kernel");
    }
    let gain = "a hole in a guest's memory costs that guest its port; without, it is filled on Ringway's account";
    Check::advice(
        "userfaultfd",
        "not in the kernel",
        gain,
        "boot a kernel with CONFIG_USERFAULTFD=y (every large distribution's)",
    )
}

pub(super) fn seccomp(host: &Host<'_>) -> Check {
    let status = host.text("proc/self/status").unwrap_or_default();
    let filter = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"))
        .map(str::trim);
    if filter == Some("2") {
        let gain = "userfaultfd, which Docker's default profile refuses: a hole in a guest's memory then costs that guest its port, not us the page";
        return Check::advice(
            "seccomp",
            "a filter is on",
            gain,
            "docker run --security-opt seccomp=configs/docker-seccomp.json",
        );
    }
    Check::ok("seccomp", "no filter")
}

pub(super) fn descriptors(host: &Host<'_>) -> Check {
    // A port with 16 queue pairs and 64 regions has some 100 descriptors.
    match host.limit("Max open files") {
        Some(Some(files)) if files < 4096 => Check::advice(
            "open files limit",
            files.to_string(),
            "room for many ports: each has 4 and more open files",
            "ulimit -n 65536; systemd: LimitNOFILE=65536",
        ),
        Some(Some(files)) => Check::ok("open files limit", files.to_string()),
        _ => Check::ok("open files limit", "unlimited"),
    }
}
