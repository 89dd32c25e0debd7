//! An uplink's session: one thread that opens a VF, keeps its queues with the workers, and starts over whenever its PF forgets it.
//!
//! The PF of an 82599 delivers to a VF only frames for addresses that were registered: every station behind the other ports of the
//! bridge is, as soon as it was learnt. Containers go on switching whatever happens here.

mod addresses;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use vfio_pmd::device::{FRAME_JUMBO, FRAME_STANDARD};
use vfio_pmd::mailbox::Cast;
use vfio_pmd::transport::Transport;
use vfio_pmd::vfio::VfioPci;
use vfio_pmd::vfio_user::VfioUser;
use vfio_pmd::{Health, Options, Vf};

use super::keys::ConfigError;
use super::port_handle::{PortHandle, RingReport, Rings, SessionReport};
use super::state::{Direction, MTU_MAX, PortSpec, PortState, RingKind, UplinkStatus};
use crate::dataplane::eth::Mac;
use crate::port::ixgbevf::{Echoes, FromWire, ToWire};
use addresses::Addresses;

/// Between two looks at link and mailbox.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks for new stations: what a new container waits for its first answer from the wire, at most.
const REGISTER: Duration = Duration::from_millis(200);
/// Longest pause between two attempts to open the device.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// What ending may take before nobody waits any longer: a mailbox exchange in progress has a deadline of a second.
const STOP_TIME: Duration = Duration::from_secs(3);

/// An uplink. Threads: any thread may call any method.
pub struct Uplink {
    stopping: Arc<AtomicBool>,
    wake: Thread,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Uplink {
    /// Starts to open the device, again and again until it is there.
    pub fn start(spec: &PortSpec, handle: Arc<dyn PortHandle>) -> Result<Uplink, ConfigError> {
        let stopping = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            spec: spec.clone(),
            handle,
            stopping: stopping.clone(),
            addresses: Addresses::new(),
            status: UplinkStatus::default(),
            rings: Vec::new(),
            notes: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("port-{}", spec.name))
            .spawn(move || keeper.run())
            .map_err(|error| {
                ConfigError(format!("port {:?}: cannot be served: {error}", spec.name))
            })?;
        Ok(Uplink {
            stopping,
            wake: thread.thread().clone(),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Asks it to end; does not wait.
    pub fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake.unpark();
    }

    /// Ends it: its queues are taken back and the device is reset.
    pub fn stop(&self) {
        self.ask_to_stop();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(thread) = thread else { return };
        let until = Instant::now() + STOP_TIME;
        while !thread.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            drop(thread.join());
        } else {
            log::warn!(
                "{}: stands still; left behind",
                thread.thread().name().unwrap_or_default()
            );
        }
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}

/// The session's thread.
struct Keeper {
    spec: PortSpec,
    handle: Arc<dyn PortHandle>,
    stopping: Arc<AtomicBool>,
    addresses: Addresses,
    status: UplinkStatus,
    /// The queues that workers have.
    rings: Vec<RingReport>,
    /// What else is not as it should be, in sentences.
    notes: Vec<String>,
}

impl Keeper {
    fn run(mut self) {
        let mut retry = Duration::from_secs(1);
        while !self.stopping() {
            match self.open() {
                Ok(mut vf) => {
                    retry = Duration::from_secs(1);
                    let lost = self.serve(&mut vf);
                    drop(vf);
                    if let Some(why) = lost {
                        log::warn!("port {:?}: {why}", self.spec.name);
                        self.report(PortState::Connecting, Some(why));
                    }
                }
                Err(why) => self.report(PortState::Connecting, Some(why)),
            }
            self.rest(retry);
            retry = (retry * 2).min(RETRY_MAX);
        }
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn rest(&self, time: Duration) {
        if !self.stopping() {
            std::thread::park_timeout(time);
        }
    }

    fn open(&self) -> Result<Vf, String> {
        let place = self.spec.place();
        let failed = |error: std::io::Error| format!("{place}: {error}");
        let transport: Arc<dyn Transport> = match (&self.spec.device, &self.spec.vfio_user) {
            (Some(address), _) => VfioPci::open(address).map_err(failed)?,
            (None, Some(path)) => VfioUser::open(Path::new(path)).map_err(failed)?,
            (None, None) => return Err("it has neither device nor vfio-user".into()),
        };
        let max_frame = match self.spec.mtu {
            MTU_MAX => FRAME_STANDARD,
            mtu => (mtu + 14).clamp(64, FRAME_JUMBO),
        };
        let options = Options {
            queues: u32::from(self.spec.queues),
            max_frame,
            ..Options::default()
        };
        Vf::open(transport, &options).map_err(|error| error.to_string())
    }

    /// Serves a VF until it is to stop (`None`) or the device cannot be had any more (why).
    fn serve(&mut self, vf: &mut Vf) -> Option<String> {
        loop {
            let ended = self
                .attach(vf)
                .and_then(|()| self.watch(vf).map_err(|error| error.to_string()));
            // Whatever it was: nobody polls the device while it starts over.
            drop(self.handle.detach());
            self.rings.clear();
            self.status.link_mbit = 0;
            match ended {
                Ok(None) => return None,
                Ok(Some(why)) => {
                    self.status.restarts += 1;
                    self.report(PortState::Connecting, Some(why));
                    if let Err(error) = self.start_over(vf) {
                        return Some(error);
                    }
                }
                Err(why) => return Some(why),
            }
        }
    }

    fn attach(&mut self, vf: &mut Vf) -> Result<(), String> {
        let granted = vf
            .set_cast(Cast::AllMulti)
            .map_err(|error| error.to_string())?;
        self.notes.clear();
        if granted < Cast::AllMulti {
            self.notes.push(
                "the PF lets multicast through only as far as other VFs asked for it: set trust on for this VF".into(),
            );
        }
        if self.spec.mtu != MTU_MAX && vf.max_frame() < (self.spec.mtu + 14).min(FRAME_JUMBO) {
            self.notes.push(format!(
                "the PF takes frames up to {} bytes only: raise its MTU",
                vf.max_frame()
            ));
        }
        self.addresses.begin();
        let echoes = Echoes::new();
        let mut rings = Rings::default();
        for (pair, queues) in vf
            .start()
            .map_err(|error| error.to_string())?
            .into_iter()
            .enumerate()
        {
            let pair = pair as u16;
            self.rings.extend(rows(pair, &Options::default()));
            rings
                .from_wire
                .push((pair, FromWire::new(queues.rx, echoes.clone())));
            rings
                .to_wire
                .push((pair, ToWire::new(queues.tx, echoes.clone(), vf.max_frame())));
        }
        self.handle
            .attach(rings)
            .map_err(|error| format!("{error:#}"))
    }

    /// Looks after a VF that runs. `None`: it is to stop. A reason: it has to start over.
    fn watch(&mut self, vf: &mut Vf) -> vfio_pmd::Result<Option<String>> {
        let (mut registered, mut counted) = (None::<Instant>, Instant::now());
        while !self.stopping() {
            match vf.health() {
                Health::Lost(why) => return Ok(Some(why.to_string())),
                Health::Up(mbit) => {
                    self.agreed(vf, mbit);
                    self.report(PortState::Forwarding, self.complaint());
                }
                Health::Down => {
                    self.agreed(vf, 0);
                    self.report(
                        PortState::Connected,
                        Some("no link: see the cable and the PF (ip link set PF up)".into()),
                    );
                }
            }
            if registered.is_none_or(|at| at.elapsed() >= REGISTER) {
                registered = Some(Instant::now());
                self.addresses.register(vf, &self.handle.stations())?;
            }
            if counted.elapsed() >= Duration::from_secs(20) {
                counted = Instant::now();
                let _ = vf.statistics(); // or their registers wrap unseen
            }
            self.rest(LOOK);
        }
        Ok(None)
    }

    /// Resets the VF until its PF answers again; an error if the device itself is gone.
    fn start_over(&mut self, vf: &mut Vf) -> Result<(), String> {
        let mut last = String::new();
        for _ in 0..10 {
            if self.stopping() {
                break;
            }
            match vf.reset() {
                Ok(()) => return Ok(()),
                Err(error) => last = error.to_string(),
            }
            self.report(PortState::Connecting, Some(last.clone()));
            self.rest(Duration::from_millis(300));
        }
        Err(last)
    }

    /// What is not as it should be while frames flow.
    fn complaint(&self) -> Option<String> {
        let mut sentences = self.notes.clone();
        sentences.extend(self.addresses.complaint());
        (!sentences.is_empty()).then(|| sentences.join("; "))
    }

    /// How it stands with the PF.
    fn agreed(&mut self, vf: &Vf, link_mbit: u32) {
        self.status = UplinkStatus {
            mac: Some(Mac::from_bytes(vf.mac())),
            api: vf.api().to_string(),
            link_mbit,
            frame_max: vf.max_frame(),
            registered: vf.addresses().len() as u64,
            refused: self.addresses.refused(),
            refusals: self.addresses.refusals(),
            restarts: self.status.restarts,
        };
    }

    fn report(&self, state: PortState, reason: Option<String>) {
        self.handle.report(SessionReport {
            state,
            reason,
            rings: self.rings.clone(),
            uplink: Some(self.status.clone()),
            ..SessionReport::default()
        });
    }
}

/// Both queues of a pair.
fn rows(pair: u16, options: &Options) -> [RingReport; 2] {
    [
        (Direction::ToWire, options.tx_ring),
        (Direction::FromWire, options.rx_ring),
    ]
    .map(|(direction, size)| RingReport {
        pair,
        direction,
        kind: RingKind::Nic,
        size: size as u16,
        enabled: true,
    })
}
