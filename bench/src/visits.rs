//! The visits of a comparison: all switches of a group started once and all but one stopped, each measured in turn, the
//! order reversed every round, so that all of them see the same minutes.

use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Result, bail};
use indicatif::ProgressBar;

use crate::client::connect_idle;
use crate::compare::{Report, Version};
use crate::console::Console;
use crate::host::hugepages_hint;
use crate::interrupt::Interrupted;
use crate::output;
use crate::peers::{Peer, Place, Setup, Switch};
use crate::rows::{Group, Row};
use crate::sample::{Rig, visit};

/// A switch that runs, mostly stopped, with the silent clients on its idle ports.
struct Instance {
    peer: usize,
    setup: Setup,
    // Dropped in this order: clients before their switch.
    idle: Vec<Console>,
    switch: Box<dyn Switch>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        // The farewell of a client needs a running switch.
        let _ = self.switch.proc().resume();
        for client in &mut self.idle {
            client.quit();
        }
    }
}

/// A comparison under way.
pub(crate) struct Run<'r> {
    pub(crate) rig: Rig,
    pub(crate) peers: Vec<Box<dyn Peer>>,
    pub(crate) report: &'r mut Report,
    pub(crate) bar: ProgressBar,
}

impl Run<'_> {
    /// Measures all rows, group by group.
    pub(crate) fn all_groups(&mut self, rows: &[Row], rounds: u32) -> Result<()> {
        for group in Group::ALL {
            let rows: Vec<_> = rows
                .iter()
                .copied()
                .filter(|row| row.group == group)
                .collect();
            if rows.is_empty() {
                continue;
            }
            let mut instances = self.start(&rows)?;
            for round in 1..=rounds {
                self.round(&rows, round, &mut instances)?;
            }
        }
        Ok(())
    }

    /// One visit to every switch for every row.
    fn round(&mut self, rows: &[Row], round: u32, instances: &mut Vec<Instance>) -> Result<()> {
        for &row in rows {
            let mut order: Vec<_> = (0..self.peers.len()).collect();
            if round.is_multiple_of(2) {
                order.reverse();
            }
            for peer in order {
                let setup = Setup::of(&row);
                if let Some(at) = instances
                    .iter()
                    .position(|it| it.peer == peer && it.setup == setup)
                    && !self.visit(row, round, &mut instances[at])?
                {
                    drop(instances.swap_remove(at));
                }
                self.bar.inc(1);
            }
        }
        Ok(())
    }

    /// Whether the switch is still there afterwards.
    fn visit(&mut self, row: Row, round: u32, instance: &mut Instance) -> Result<bool> {
        let name = self.peers[instance.peer].name();
        self.bar
            .set_message(format!("round {round}: {} on {name}", row.name));
        let mut client = String::new();
        let visited = visit(
            &self.rig,
            row,
            name,
            round,
            &mut *instance.switch,
            &mut client,
        );
        self.note_version("client", &client);
        match visited {
            Ok(samples) => {
                for sample in samples {
                    self.say(&output::line(&sample));
                    self.report.samples.push(sample);
                }
                Ok(true)
            }
            Err(error) if error.is::<Interrupted>() => Err(error),
            Err(error) => {
                let failure = format!("round {round}, {} on {name}: {error:#}", row.name);
                self.say(&failure);
                self.report.failures.push(failure);
                let alive =
                    Path::new(&format!("/proc/{}/exe", instance.switch.proc().pid())).exists();
                if !alive {
                    self.report
                        .failures
                        .push(format!("{name} ended; it is left out from here on"));
                }
                Ok(alive)
            }
        }
    }

    /// Starts what the rows need. A switch that does not start is left out.
    fn start(&mut self, rows: &[Row]) -> Result<Vec<Instance>> {
        let mut instances: Vec<Instance> = Vec::new();
        for row in rows {
            let setup = Setup::of(row);
            for peer in 0..self.peers.len() {
                let name = self.peers[peer].name();
                if let Some(reason) = self.peers[peer].cannot(row) {
                    self.leave_out(format!("{name} in {}: {reason}", row.name));
                    continue;
                }
                if instances
                    .iter()
                    .any(|it| it.peer == peer && it.setup == setup)
                {
                    continue;
                }
                self.bar
                    .set_message(format!("starting {name} with {} ports", setup.ports));
                match self.start_one(peer, setup) {
                    Ok(instance) => instances.push(instance),
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    Err(error) => self.leave_out(format!("{name}: {error:#}{}", hugepages_hint())),
                }
            }
        }
        if instances.is_empty() {
            bail!("no switch could be started");
        }
        Ok(instances)
    }

    fn start_one(&mut self, peer: usize, setup: Setup) -> Result<Instance> {
        let place = Place {
            directory: self.rig.directory.clone(),
            cpus: self.rig.cpus,
            containers: Vec::new(),
        };
        let switch = self.peers[peer].start(setup, &place)?;
        self.note_version(self.peers[peer].name(), switch.version());
        let idle = connect_idle(
            switch.sockets().get(2..).unwrap_or_default(),
            self.rig.cpus,
            &self.rig.directory,
        )?;
        switch.proc().pause()?;
        Ok(Instance {
            peer,
            setup,
            idle,
            switch,
        })
    }

    fn note_version(&mut self, name: &'static str, version: &str) {
        if !version.is_empty() && !self.report.peers.iter().any(|known| known.name == name) {
            self.report.peers.push(Version {
                name,
                version: version.to_owned(),
            });
        }
    }

    fn leave_out(&mut self, line: String) {
        if !self.report.left_out.contains(&line) {
            self.say(&format!("left out: {line}"));
            self.report.left_out.push(line);
        }
    }

    /// A line above the progress bar, or in the log.
    fn say(&self, line: &str) {
        if std::io::stderr().is_terminal() {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }
}
