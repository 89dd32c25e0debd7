//! `/metrics` for Prometheus: a [`StatsReport`] and the states of the ports, in OpenMetrics text.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::state::{Counters, PortState, PortStatus, StatsReport, UplinkStatus, WorkerStatus};

/// What the text is called in HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text for one moment.
pub fn encode(stats: StatsReport, ports: &[PortStatus]) -> String {
    let mut registry = Registry::with_prefix("ringway");
    let states = ports
        .iter()
        .map(|port| (port.spec.name.clone(), (port.state, port.put_out.guests)));
    let uplinks = ports
        .iter()
        .filter_map(|port| Some((port.spec.name.clone(), port.uplink.clone()?)));
    registry.register_collector(Box::new(Moment {
        stats,
        states: states.collect(),
        uplinks: uplinks.collect(),
    }));
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Moment {
    stats: StatsReport,
    /// State, and guests put out.
    states: BTreeMap<String, (PortState, u64)>,
    uplinks: BTreeMap<String, UplinkStatus>,
}

type Labels<'a> = Vec<(&'static str, &'a str)>;
type CounterOf = (&'static str, &'static str, fn(&Counters) -> u64);

const COUNTERS: [CounterOf; 5] = [
    (
        "port_received_frames",
        "Frames taken from the guest",
        |counters| counters.received,
    ),
    (
        "port_received_bytes",
        "Bytes taken from the guest",
        |counters| counters.received_bytes,
    ),
    (
        "port_sent_frames",
        "Frames given to the guest",
        |counters| counters.sent,
    ),
    ("port_sent_bytes", "Bytes given to the guest", |counters| {
        counters.sent_bytes
    }),
    (
        "port_replicated_frames",
        "Extra copies of flooded frames",
        |counters| counters.replicated,
    ),
];

type UplinkValue = (&'static str, &'static str, Kind, fn(&UplinkStatus) -> u64);

const UPLINKS: [UplinkValue; 5] = [
    (
        "uplink_address_refusals",
        "Times the PF refused a station's address (trust on, spoofchk off; the pool of addresses is shared)",
        Kind::Counter,
        |uplink| uplink.refusals,
    ),
    (
        "uplink_restarts",
        "Times the VF had to start over: its PF was reset or took its leave to send",
        Kind::Counter,
        |uplink| uplink.restarts,
    ),
    (
        "uplink_addresses_refused",
        "Stations the wire cannot reach because the PF refused their addresses",
        Kind::Gauge,
        |uplink| uplink.refused.len() as u64,
    ),
    (
        "uplink_addresses_registered",
        "Stations whose frames the PF delivers",
        Kind::Gauge,
        |uplink| uplink.registered,
    ),
    (
        "uplink_link_mbits",
        "Speed of the link in Mbit/s, 0 without one",
        Kind::Gauge,
        |uplink| uplink.link_mbit.into(),
    ),
];

type WorkerCounter = (&'static str, &'static str, fn(&WorkerStatus) -> u64);

const WORKER_COUNTERS: [WorkerCounter; 5] = [
    (
        "worker_cycles",
        "TSC cycles since the worker started",
        |worker| worker.cycles,
    ),
    (
        "worker_busy_cycles",
        "TSC cycles of turns that moved frames",
        |worker| worker.busy_cycles,
    ),
    ("worker_turns", "Turns taken", |worker| worker.turns),
    ("worker_sleeps", "Times the worker slept", |worker| {
        worker.sleeps
    }),
    (
        "worker_received_frames",
        "Frames the worker took from guests",
        |worker| worker.counters.received,
    ),
];

impl Collector for Moment {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.ports(&mut encoder)?;
        let states = self.states.iter();
        family(
            &mut encoder,
            "port_put_out_guests",
            "Guests that broke the rules and were put out",
            Kind::Counter,
            states.map(|(port, (_, guests))| (vec![("port", port.as_str())], *guests)),
        )?;
        for (name, help, kind, read) in UPLINKS {
            let uplinks = self.uplinks.iter();
            let values =
                uplinks.map(|(port, uplink)| (vec![("port", port.as_str())], read(uplink)));
            family(&mut encoder, name, help, kind, values)?;
        }
        self.workers(&mut encoder)?;
        self.whole(&mut encoder)
    }
}

impl Moment {
    fn ports(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let ports = &self.stats.ports;
        for (name, help, read) in COUNTERS {
            let values = ports
                .iter()
                .map(|(port, counters)| (vec![("port", port.as_str())], read(counters)));
            family(encoder, name, help, Kind::Counter, values)?;
        }
        let drops = ports.iter().flat_map(|(port, counters)| {
            let reasons = counters.dropped.iter();
            reasons.map(move |(reason, frames)| {
                (
                    vec![("port", port.as_str()), ("reason", reason.as_str())],
                    *frames,
                )
            })
        });
        family(
            encoder,
            "port_dropped_frames",
            "Frames that went nowhere, by reason",
            Kind::Counter,
            drops,
        )?;
        let states: Vec<_> = self
            .states
            .iter()
            .map(|(port, (state, _))| (port, state.to_string()))
            .collect();
        let states = states
            .iter()
            .map(|(port, state)| (vec![("port", port.as_str()), ("state", state.as_str())], 1));
        family(
            encoder,
            "port_state",
            "1 for the state the port is in",
            Kind::Gauge,
            states,
        )
    }

    fn workers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let workers = &self.stats.workers;
        let cpus: Vec<String> = workers
            .iter()
            .map(|worker| worker.cpu.to_string())
            .collect();
        for (name, help, read) in WORKER_COUNTERS {
            let values = workers
                .iter()
                .zip(&cpus)
                .map(|(worker, cpu)| (vec![("cpu", cpu.as_str())], read(worker)));
            family(encoder, name, help, Kind::Counter, values)?;
        }
        Ok(())
    }

    fn whole(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let StatsReport {
            fdb,
            uptime_seconds,
            ..
        } = &self.stats;
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        let gauges = [
            (
                "fdb_stations",
                "Stations in the forwarding table",
                vec![],
                fdb.used,
            ),
            (
                "fdb_capacity",
                "Stations the forwarding table can hold",
                vec![],
                fdb.capacity,
            ),
            (
                "uptime_seconds",
                "Seconds since the start",
                vec![],
                *uptime_seconds as u64,
            ),
            ("build_info", "1, with the version as label", version, 1),
        ];
        for (name, help, labels, value) in gauges {
            family(encoder, name, help, Kind::Gauge, [(labels, value)])?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

fn family<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    kind: Kind,
    values: impl IntoIterator<Item = (Labels<'a>, u64)>,
) -> Result<(), fmt::Error> {
    let metric_type = match kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
    };
    let mut metric = encoder.encode_descriptor(name, help, None, metric_type)?;
    let write = |value: u64, metric: MetricEncoder<'_>| match kind {
        Kind::Counter => ConstCounter::new(value).encode(metric),
        Kind::Gauge => ConstGauge::new(value as i64).encode(metric),
    };
    for (labels, value) in values {
        if labels.is_empty() {
            return write(value, metric); // the only one of its family
        }
        write(value, metric.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::state::{PortSpec, PutOut};

    #[test]
    fn names_every_port_reason_state_and_worker() {
        let mut stats = StatsReport::default();
        let blue = Counters {
            received: 7,
            dropped: [("tx_full".to_owned(), 3)].into(),
            ..Counters::default()
        };
        stats.ports.insert("blue".into(), blue);
        stats.fdb.used = 5;
        let uplink = UplinkStatus {
            refusals: 9,
            registered: 4,
            ..UplinkStatus::default()
        };
        let port = PortStatus {
            spec: PortSpec::vhost_user("blue", "/run/blue"),
            state: PortState::Forwarding,
            reason: None,
            since_seconds: 1,
            connects: 1,
            put_out: PutOut {
                guests: 2,
                ..PutOut::default()
            },
            peer: None,
            features: vec![],
            protocol_features: vec![],
            memory: vec![],
            queues: vec![],
            counters: Counters::default(),
            uplink: Some(uplink),
        };
        let text = encode(stats, &[port]);
        for line in [
            "# TYPE ringway_port_received_frames counter",
            "ringway_port_received_frames_total{port=\"blue\"} 7",
            "ringway_port_dropped_frames_total{port=\"blue\",reason=\"tx_full\"} 3",
            "ringway_port_state{port=\"blue\",state=\"forwarding\"} 1",
            "ringway_port_put_out_guests_total{port=\"blue\"} 2",
            "ringway_fdb_stations 5",
            "ringway_uplink_address_refusals_total{port=\"blue\"} 9",
            "ringway_uplink_addresses_registered{port=\"blue\"} 4",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is not in\n{text}"
            );
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
