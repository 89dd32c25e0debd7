//! What machine a figure comes from.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Host {
    /// What it calls itself; runs saved by older versions do not tell.
    #[serde(default)]
    pub(crate) name: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    /// Cycles per frame are cycles of this clock.
    pub(crate) tsc_ghz: f64,
    pub(crate) kernel: String,
    pub(crate) system: String,
    /// Whether a hypervisor lies below: then cores move.
    pub(crate) virtual_machine: bool,
    pub(crate) hugepages_2m: u64,
}

impl Host {
    /// Looks around.
    pub(crate) fn look(tsc_hz: f64) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self {
            name: fs::read_to_string("/proc/sys/kernel/hostname")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            cpu: after(&cpuinfo, "model name")
                .trim_start_matches([' ', '\t', ':'])
                .to_owned(),
            cpus: cpuinfo
                .lines()
                .filter(|line| line.starts_with("processor"))
                .count(),
            tsc_ghz: (tsc_hz / 1e6).round() / 1e3,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
            system: after(&release, "PRETTY_NAME=").trim_matches('"').to_owned(),
            virtual_machine: cpuinfo.contains("hypervisor"),
            hugepages_2m: hugepages("HugePages_Total:"),
        }
    }
}

/// The rest of the first line that begins with `label`.
fn after<'t>(text: &'t str, label: &str) -> &'t str {
    text.lines()
        .find_map(|line| line.strip_prefix(label))
        .unwrap_or_default()
}

fn hugepages(label: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    after(&meminfo, label).trim().parse().unwrap_or(0)
}

/// Hugepages of 2 MB that nobody uses.
pub(crate) fn free_hugepages() -> u64 {
    hugepages("HugePages_Free:").saturating_sub(hugepages("HugePages_Rsvd:"))
}

/// Most starts that fail do so for want of hugepages: what there is, and how to get more.
pub(crate) fn hugepages_hint() -> String {
    let free = hugepages("HugePages_Free:");
    // OVS takes 400, once for each number of ports that the rows ask for; testpmd 128 as a switch and 128 as a client.
    if free >= 400 {
        return String::new();
    }
    format!(
        " (only {free} free hugepages of 2 MB: OVS takes 400, testpmd 128 and the client 128; \
         echo 1200 > /proc/sys/vm/nr_hugepages, or 2600 for rows with idle ports on OVS)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_gives_the_rest_of_its_line() {
        assert_eq!(
            after("a: 1\nmodel name\t: AMD EPYC\n", "model name"),
            "\t: AMD EPYC"
        );
        assert_eq!(after("", "model name"), "");
    }

    #[test]
    fn this_machine_has_a_cpu_and_a_kernel() {
        let host = Host::look(2.596_148e9);
        assert!(host.cpus >= 1 && !host.kernel.is_empty());
        assert!((host.tsc_ghz - 2.596).abs() < 1e-9);
    }
}
