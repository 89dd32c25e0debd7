//! Which CPUs there are, which of them workers should take, and pinning to them.

use std::collections::BTreeSet;
use std::path::Path;

use super::keys::ConfigError;
use super::spec::list;

/// The CPUs of this host, as this process may use them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpus {
    /// CPUs that are online.
    pub online: BTreeSet<usize>,
    /// CPUs the cgroup cpuset allows: those a worker can be pinned to.
    pub allowed: BTreeSet<usize>,
    /// CPUs the process was started on (`taskset`, `CPUAffinity=`).
    pub affinity: BTreeSet<usize>,
    /// CPUs the kernel keeps free of other work (`isolcpus=`, isolated cpuset partitions).
    pub isolated: BTreeSet<usize>,
    /// CPUs of each NUMA node.
    pub nodes: Vec<BTreeSet<usize>>,
    /// CPUs of each core with more than one (SMT).
    pub siblings: Vec<BTreeSet<usize>>,
}

impl HostCpus {
    /// This host. `root` is `/`, or a tree with `proc` and `sys` in it.
    pub fn read(root: &Path) -> HostCpus {
        let cpus = root.join("sys/devices/system/cpu");
        let affinity = affinity(root);
        let online = read_list(&cpus.join("online")).unwrap_or_else(|| affinity.clone());
        let allowed = cpuset(root).map_or_else(|| affinity.clone(), |cpuset| &cpuset & &online);
        let siblings: BTreeSet<BTreeSet<usize>> = online
            .iter()
            .filter_map(|cpu| {
                read_list(&cpus.join(format!("cpu{cpu}/topology/thread_siblings_list")))
            })
            .filter(|group| group.len() > 1)
            .collect();
        let nodes = (0..)
            .map_while(|node| {
                read_list(&root.join(format!("sys/devices/system/node/node{node}/cpulist")))
            })
            .collect();
        HostCpus {
            isolated: read_list(&cpus.join("isolated")).unwrap_or_default(),
            siblings: siblings.into_iter().collect(),
            online,
            allowed,
            affinity,
            nodes,
        }
    }

    /// A host with CPUs 0 to `size` - 1 and nothing special about them.
    pub fn of_size(size: usize) -> HostCpus {
        let all: BTreeSet<usize> = (0..size).collect();
        HostCpus {
            online: all.clone(),
            allowed: all.clone(),
            affinity: all,
            ..HostCpus::default()
        }
    }

    /// Refuses CPUs that workers cannot run on. The sentence goes on after the name of what asked for them.
    pub fn check(&self, cpus: &[usize]) -> Result<(), String> {
        if let Some(cpu) = cpus.iter().find(|cpu| !self.online.contains(cpu)) {
            return Err(format!(
                "names CPU {cpu}, but this host has {}: name some of those",
                list(&self.online)
            ));
        }
        match cpus.iter().find(|cpu| !self.allowed.contains(cpu)) {
            Some(cpu) => Err(format!(
                "names CPU {cpu}, but the cgroup cpuset allows {} only: name some of those, or widen the cpuset",
                list(&self.allowed)
            )),
            None => Ok(()),
        }
    }

    /// Chooses CPUs for `count` workers, fewer if there are fewer: isolated ones first, not beside a sibling, on one NUMA node,
    /// and CPU 0 last, as the kernel keeps house there.
    pub fn choose(&self, count: usize) -> Vec<usize> {
        let mut free = self.candidates();
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < count {
            let cost = |cpu: &usize| {
                let beside = |other: &usize| {
                    self.siblings
                        .iter()
                        .any(|core| core.contains(cpu) && core.contains(other))
                };
                let far = chosen
                    .first()
                    .is_some_and(|first| self.node(*first) != self.node(*cpu));
                (
                    !self.isolated.contains(cpu),
                    *cpu == 0,
                    chosen.iter().any(beside),
                    far,
                    beside(&0),
                    *cpu,
                )
            };
            let Some(best) = free.iter().copied().min_by_key(cost) else {
                break;
            };
            free.remove(&best);
            chosen.push(best);
        }
        chosen
    }

    /// The NUMA node of a CPU, where the kernel tells.
    pub fn node(&self, cpu: usize) -> Option<usize> {
        self.nodes.iter().position(|node| node.contains(&cpu))
    }

    /// CPUs for everything that is not a worker; all that are allowed if the workers take every one. Somebody who started
    /// the process on some CPUs only (`taskset`) wants no other thread of it elsewhere.
    pub fn housekeeping(&self, workers: &[usize]) -> BTreeSet<usize> {
        let mine = self.candidates();
        let rest: BTreeSet<usize> = mine
            .iter()
            .copied()
            .filter(|cpu| !workers.contains(cpu))
            .collect();
        let quiet = &rest - &self.isolated;
        [quiet, rest]
            .into_iter()
            .find(|set| !set.is_empty())
            .unwrap_or(mine)
    }

    /// What a default choice may take. A process starts outside isolated CPUs, so these count as its own; a narrower
    /// affinity than that was somebody's wish.
    fn candidates(&self) -> BTreeSet<usize> {
        let started_on = &self.affinity & &self.allowed;
        let with_isolated = &started_on | &(&self.isolated & &self.allowed);
        if with_isolated == self.allowed || started_on.is_empty() {
            self.allowed.clone()
        } else {
            started_on
        }
    }
}

/// Pins the calling thread to one CPU, and makes sure that it is.
pub fn pin(cpu: usize) -> Result<(), ConfigError> {
    // Beyond `CpuSet::MAX_CPU` the call would abort the process.
    let can_be = cpu < rustix::thread::CpuSet::MAX_CPU;
    let set = can_be && core_affinity::set_for_current(core_affinity::CoreId { id: cpu });
    let now = rustix::thread::sched_getaffinity(None);
    if set
        && now
            .as_ref()
            .is_ok_and(|now| now.count() == 1 && now.is_set(cpu))
    {
        return Ok(());
    }
    Err(ConfigError(format!(
        "no worker can run on CPU {cpu}: the kernel refused to pin a thread to it: is it online and in the cgroup cpuset (ringway doctor tells)?"
    )))
}

/// Keeps the calling thread, and those it starts, on these CPUs.
pub fn keep_to(cpus: &BTreeSet<usize>) -> Result<(), ConfigError> {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter()
        .filter(|cpu| **cpu < rustix::thread::CpuSet::MAX_CPU)
        .for_each(|cpu| set.set(*cpu));
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| {
        ConfigError(format!(
            "cannot keep to {}: {error}: is the cgroup cpuset narrower?",
            list(cpus)
        ))
    })
}

/// Reads `0-2,5` as the kernel writes it.
pub(crate) fn parse_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // More CPUs than Linux supports: not a list of CPUs.
        if last >= 1 << 16 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

fn read_list(file: &Path) -> Option<BTreeSet<usize>> {
    parse_list(&std::fs::read_to_string(file).ok()?)
}

fn affinity(root: &Path) -> BTreeSet<usize> {
    let status = std::fs::read_to_string(root.join("proc/self/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.and_then(parse_list).unwrap_or_default()
}

fn cpuset(root: &Path) -> Option<BTreeSet<usize>> {
    parse_list(&cgroup_file(
        root,
        "cpuset",
        "cpuset.cpus.effective",
        "cpuset.effective_cpus",
    )?)
}

/// A file of this process's cgroup that is not empty. A cgroup without it has its parent's.
pub(crate) fn cgroup_file(root: &Path, controller: &str, v2: &str, v1: &str) -> Option<String> {
    cgroup_files(root, controller, v2, v1).into_iter().next()
}

/// A file of this process's cgroup and of those above it, from the lowest up, as far as it is there and not empty: of version 2, or
/// of the `controller`'s hierarchy of version 1.
pub(crate) fn cgroup_files(root: &Path, controller: &str, v2: &str, v1: &str) -> Vec<String> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let read = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let base = root.join("sys/fs/cgroup");
        let (base, file) = match controllers {
            "" => (base, v2),
            some if some.split(',').any(|name| name == controller) => (base.join(controller), v1),
            _ => return None,
        };
        let group = base.join(path.trim_start_matches('/'));
        let up = group
            .ancestors()
            .take_while(|group| group.starts_with(&base));
        let texts = up.filter_map(|group| std::fs::read_to_string(group.join(file)).ok());
        let texts: Vec<String> = texts
            .map(|text| text.trim().to_owned())
            .filter(|text| !text.is_empty())
            .collect();
        (!texts.is_empty()).then_some(texts)
    };
    groups.lines().find_map(read).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a file")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        root
    }

    fn set(cpus: &[usize]) -> BTreeSet<usize> {
        cpus.iter().copied().collect()
    }

    #[test]
    fn takes_isolated_cpus_although_the_process_started_outside_them() {
        let root = tree(&[
            ("sys/devices/system/cpu/online", "0-3\n"),
            ("sys/devices/system/cpu/isolated", "2-3\n"),
            (
                "proc/self/status",
                "Name:\tringway\nCpus_allowed_list:\t0-1\n",
            ),
            ("proc/self/cgroup", "0::/system.slice/ringway.service\n"),
            ("sys/fs/cgroup/cpuset.cpus.effective", "0-3\n"),
        ]);
        let host = HostCpus::read(root.path());
        assert_eq!(host.allowed, set(&[0, 1, 2, 3]));
        assert_eq!(host.choose(3), [2, 3, 1]);
        assert_eq!(host.housekeeping(&[2]), set(&[0, 1]));
    }

    #[test]
    fn obeys_the_cpuset_of_its_cgroup_and_an_affinity_somebody_chose() {
        let root = tree(&[
            ("sys/devices/system/cpu/online", "0-7\n"),
            ("proc/self/status", "Cpus_allowed_list:\t2\n"),
            ("proc/self/cgroup", "4:memory:/x\n3:cpuset,cpu:/pod\n"),
            ("sys/fs/cgroup/cpuset/pod/cpuset.effective_cpus", "1-3\n"),
        ]);
        let host = HostCpus::read(root.path());
        assert_eq!(host.choose(4), [2]);
        assert_eq!(host.housekeeping(&[2]), set(&[2]));
        assert_eq!(host.housekeeping(&[3]), set(&[2]));
        assert_eq!(
            host.check(&[5]),
            Err("names CPU 5, but the cgroup cpuset allows CPUs 1, 2, 3 only: name some of those, or widen the cpuset".into())
        );
        assert_eq!(
            host.check(&[8]),
            Err(
                "names CPU 8, but this host has CPUs 0, 1, 2, 3, 4, 5, 6, 7: name some of those"
                    .into()
            )
        );
        assert_eq!(host.check(&[1, 3]), Ok(()));
    }

    #[test]
    fn leaves_cpu_0_siblings_and_far_nodes_for_last() {
        let mut host = HostCpus::of_size(8);
        host.siblings = vec![set(&[0, 4]), set(&[1, 5]), set(&[2, 6]), set(&[3, 7])];
        host.nodes = vec![set(&[0, 1, 4, 5]), set(&[2, 3, 6, 7])];
        assert_eq!(host.choose(1), [1]);
        assert_eq!(
            host.choose(4),
            [1, 4, 2, 3],
            "cores of their own first, and of those the near one"
        );
        assert_eq!(host.choose(99).last(), Some(&0));
        assert_eq!(host.choose(99).len(), 8, "never two workers on one CPU");
    }

    #[test]
    fn this_host_can_be_read_and_pinned_to() {
        let host = HostCpus::read(Path::new("/"));
        let chosen = host.choose(1);
        assert_eq!(host.check(&chosen), Ok(()));
        std::thread::spawn(move || pin(chosen[0]).expect("an allowed CPU"))
            .join()
            .expect("no panic");
        let refused = std::thread::spawn(|| pin(60_000)).join().expect("no panic");
        assert!(
            refused
                .is_err_and(|error| error.to_string().contains("no worker can run on CPU 60000"))
        );
    }

    #[test]
    fn reads_lists_as_the_kernel_writes_them() {
        assert_eq!(parse_list("0-2,5\n"), Some(set(&[0, 1, 2, 5])));
        assert_eq!(parse_list("\n"), Some(set(&[])));
        assert_eq!(parse_list("a"), None);
        assert_eq!(parse_list("0-99999999"), None);
    }
}
