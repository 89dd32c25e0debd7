//! The mailbox against a PF that follows a script: recorded conversations of two independent drivers, and what can go wrong.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::transport::{DmaRange, Registers};

/// One exchange: what the VF must say, and what happens then.
struct Step {
    expect: Vec<u32>,
    then: Then,
}

enum Then {
    /// The PF answers with these words.
    Answer(Vec<u32>),
    /// The PF says these words on its own first, then answers.
    Interrupt(Vec<u32>, Vec<u32>),
    /// The PF stays silent.
    Nothing,
}

#[derive(Default)]
struct Pf {
    memory: [u32; 16],
    state: u32,
    script: VecDeque<Step>,
    /// What the PF says once the VF acknowledged the last message.
    later: Option<Vec<u32>>,
    /// Locking attempts that fail.
    held: u32,
    looks: u64,
}

impl Pf {
    fn say(&mut self, words: &[u32]) {
        self.memory[..words.len()].copy_from_slice(words);
        self.state |= regs::MAILBOX_PFSTS;
    }

    fn request(&mut self) {
        let step = self.script.pop_front().expect("a message nobody expected");
        assert_eq!(
            &self.memory[..step.expect.len()],
            &step.expect[..],
            "the VF said something else"
        );
        self.state |= regs::MAILBOX_PFACK;
        match step.then {
            Then::Answer(words) => self.say(&words),
            Then::Interrupt(first, answer) => {
                self.say(&first);
                self.later = Some(answer);
            }
            Then::Nothing => {}
        }
    }
}

struct Script(Mutex<Pf>);

impl Registers for Script {
    fn read(&self, offset: u32) -> u32 {
        let mut pf = self.0.lock().unwrap();
        match offset {
            regs::VFMAILBOX => {
                pf.looks += 1;
                let state = pf.state;
                pf.state &= !regs::MAILBOX_READ_TO_CLEAR;
                state
            }
            regs::VFMBMEM..=0x23C => pf.memory[(offset as usize - 0x200) / 4],
            _ => 0,
        }
    }

    fn write(&self, offset: u32, value: u32) {
        let mut pf = self.0.lock().unwrap();
        match offset {
            regs::VFMAILBOX => {
                pf.state &= !regs::MAILBOX_VFU;
                if value & regs::MAILBOX_VFU != 0 {
                    if pf.held > 0 {
                        pf.held -= 1;
                    } else {
                        pf.state |= regs::MAILBOX_VFU;
                    }
                }
                if value & regs::MAILBOX_REQ != 0 {
                    pf.request();
                }
                if value & regs::MAILBOX_ACK != 0
                    && let Some(words) = pf.later.take()
                {
                    pf.say(&words);
                }
            }
            regs::VFMBMEM..=0x23C => {
                assert!(pf.state & regs::MAILBOX_VFU != 0, "wrote without the lock");
                pf.memory[(offset as usize - 0x200) / 4] = value;
            }
            _ => {}
        }
    }
}

/// A transport whose time does not pass.
struct Still;

impl Transport for Still {
    fn name(&self) -> String {
        "script".into()
    }
    fn read_config(&self, _: u32, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn write_config(&self, _: u32, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn registers(self: Arc<Self>) -> io::Result<Bar> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn map_dma(&self, _: &DmaRange<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unmap_dma(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn vectors(&self) -> u32 {
        0
    }
    fn set_interrupts(&self, _: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn reset(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn pause(&self, _: Duration) {}
}

fn talk(script: Vec<(&[u32], Then)>) -> (Mailbox, Arc<Script>) {
    let script = script
        .into_iter()
        .map(|(expect, then)| Step {
            expect: expect.to_vec(),
            then,
        })
        .collect();
    let pf = Arc::new(Script(Mutex::new(Pf {
        script,
        ..Pf::default()
    })));
    (Mailbox::new(Bar::called(pf.clone()), Arc::new(Still)), pf)
}

fn answer(words: &[u32]) -> Then {
    Then::Answer(words.to_vec())
}

fn done(pf: &Script) -> bool {
    pf.0.lock().unwrap().script.is_empty()
}

const OK: u32 = ACK | CTS;
const NO: u32 = NACK | CTS;

#[test]
fn a_pf_of_version_1_4_is_found_by_asking_downwards_as_linux_does() {
    let (mut mailbox, pf) = talk(vec![
        (&[0x01], answer(&[0x8000_0001, 0x5544_3302, 0x0000_0166, 0])),
        (&[0x08, 6], answer(&[0x6000_0008])),
        (&[0x08, 5], answer(&[0xA000_0008])),
        (&[0x09], answer(&[0xA000_0009, 4, 4, 0, 0])),
        (&[0x0C, 1], answer(&[OK | 0x0C, 1])),
        (&[0x0001_0003, 0x0010], answer(&[OK | 0x03])),
        (&[0x06], answer(&[OK | 0x06])),
        (&[0x05, 0x5EE], answer(&[OK | 0x05])),
        (&[0x02, 0x5544_3302, 0x0166], answer(&[OK | 0x02])),
        (&[0x10], answer(&[OK | 0x10, 1])),
    ]);
    let reply = mailbox.reset().unwrap();
    assert_eq!(reply.mac, Some([0x02, 0x33, 0x44, 0x55, 0x66, 0x01]));
    assert_eq!(mailbox.negotiate(), Ok(Api::V1_4));
    assert_eq!(mailbox.queues(), Ok(Some(QueueGrant { tx: 4, rx: 4 })));
    assert_eq!(mailbox.cast(Cast::Multi), Ok(Cast::Multi));
    let hash = multicast_hash([0x33, 0x33, 0, 0, 0, 1], reply.filter_type);
    assert_eq!(mailbox.set_multicast(&[hash]), Ok(()));
    assert_eq!(mailbox.clear_addresses(), Ok(()));
    assert_eq!(mailbox.set_max_frame(1518), Ok(()));
    assert_eq!(mailbox.set_mac(reply.mac.unwrap()), Ok(()));
    assert_eq!(mailbox.link_enabled(), Ok(Some(true)));
    assert!(done(&pf));
}

#[test]
fn promiscuous_mode_is_refused_as_an_82599_does_and_the_rest_goes_on() {
    let (mut mailbox, _) = talk(vec![
        (&[0x08, 6], answer(&[NO | 0x08])),
        (&[0x08, 5], answer(&[NO | 0x08])),
        (&[0x08, 4], answer(&[OK | 0x08])),
        (&[0x0C, 3], answer(&[0x6000_000C])),
        (&[0x0C, 2], answer(&[OK | 0x0C, 1])),
    ]);
    assert_eq!(mailbox.negotiate(), Ok(Api::V1_3));
    assert_eq!(mailbox.cast(Cast::Promiscuous), Err(MailboxError::Refused));
    // All multicast from an untrusted VF: granted in name, multicast in fact.
    assert_eq!(mailbox.cast(Cast::AllMulti), Ok(Cast::Multi));
}

#[test]
fn a_refused_reset_means_that_nobody_set_an_address() {
    let (mut mailbox, _) = talk(vec![(&[0x01], answer(&[NACK | 1, 0x5544_3302, 0x0166, 0]))]);
    assert_eq!(mailbox.reset().unwrap().mac, None);
}

#[test]
fn a_group_address_from_the_pf_is_no_address() {
    let (mut mailbox, _) = talk(vec![(&[0x01], answer(&[ACK | 1, 0x5544_3303, 0x0166, 0]))]);
    assert_eq!(mailbox.reset().unwrap().mac, None);
}

#[test]
fn a_pf_that_knows_no_version_speaks_1_0() {
    let script = [6u32, 5, 4, 3, 2, 0].map(|wire| [0x08, wire]);
    let (mut mailbox, pf) = talk(
        script
            .iter()
            .map(|words| (&words[..], answer(&[NO | 0x08])))
            .collect(),
    );
    assert_eq!(mailbox.negotiate(), Ok(Api::V1_0));
    assert_eq!(mailbox.queues(), Ok(None));
    assert_eq!(mailbox.cast(Cast::Multi), Err(MailboxError::Refused));
    assert_eq!(mailbox.link_enabled(), Ok(None));
    assert!(done(&pf));
}

#[test]
fn a_mailbox_held_by_the_pf_is_asked_for_again() {
    let (mut mailbox, pf) = talk(vec![(&[0x05, 1518], answer(&[OK | 5]))]);
    pf.0.lock().unwrap().held = 7;
    assert_eq!(mailbox.set_max_frame(1518), Ok(()));
    pf.0.lock().unwrap().held = u32::MAX;
    assert_eq!(mailbox.set_max_frame(1518), Err(MailboxError::Busy));
    assert!(pf.0.lock().unwrap().looks < 3 * u64::from(LOOKS));
}

#[test]
fn a_silent_pf_is_given_up_after_a_bounded_time() {
    let (mut mailbox, pf) = talk(vec![(&[0x01], Then::Nothing)]);
    assert_eq!(mailbox.reset(), Err(MailboxError::Silent));
    assert!(pf.0.lock().unwrap().looks < 2 * u64::from(LOOKS));
}

#[test]
fn what_the_pf_says_on_its_own_does_not_pass_for_an_answer() {
    let (mut mailbox, pf) = talk(vec![(
        &[0x05, 1518],
        Then::Interrupt(vec![PF_CONTROL | CTS], vec![OK | 5]),
    )]);
    assert_eq!(mailbox.set_max_frame(1518), Ok(()));
    assert!(done(&pf));
}

#[test]
fn a_pf_without_clear_to_send_has_forgotten_the_vf() {
    let (mut mailbox, pf) = talk(vec![(&[0x05, 1518], answer(&[NACK | 5]))]);
    assert_eq!(mailbox.set_max_frame(1518), Err(MailboxError::Forgotten));
    assert_eq!(mailbox.listen(), Ok(()));
    pf.0.lock().unwrap().say(&[PF_CONTROL | CTS]);
    assert_eq!(mailbox.listen(), Ok(()));
    pf.0.lock().unwrap().say(&[PF_CONTROL]);
    assert_eq!(mailbox.listen(), Err(MailboxError::Forgotten));
    pf.0.lock().unwrap().state |= regs::MAILBOX_RSTD;
    assert_eq!(mailbox.listen(), Err(MailboxError::Forgotten));
    assert_eq!(mailbox.listen(), Ok(()));
}

#[test]
fn a_signal_cleared_by_somebody_elses_look_is_not_lost() {
    let (mut mailbox, pf) = talk(vec![]);
    pf.0.lock().unwrap().say(&[PF_CONTROL]);
    // This look clears PFSTS in the register.
    assert!(!mailbox.pf_in_reset());
    assert_eq!(pf.0.lock().unwrap().state & regs::MAILBOX_PFSTS, 0);
    assert_eq!(mailbox.listen(), Err(MailboxError::Forgotten));
}

#[test]
fn old_words_behind_a_short_answer_are_not_believed() {
    let (mut mailbox, _) = talk(vec![
        (&[0x08, 6], answer(&[NO | 8])),
        (&[0x08, 5], answer(&[NO | 8])),
        (&[0x08, 4], answer(&[NO | 8])),
        (&[0x08, 3], answer(&[OK | 8])),
        // Four queues in the reply, then a reply with only the verdict: the mode granted is not the old word 1.
        (&[0x09], answer(&[OK | 9, 4, 4, 0, 0])),
        (&[0x0C, 2], answer(&[NO | 0x0C])),
    ]);
    assert_eq!(mailbox.negotiate(), Ok(Api::V1_2));
    assert!(mailbox.queues().unwrap().is_some());
    assert_eq!(mailbox.cast(Cast::AllMulti), Err(MailboxError::Refused));
}

#[test]
fn an_answer_to_another_question_is_an_error() {
    let (mut mailbox, _) = talk(vec![(&[0x05, 1518], answer(&[OK | 2]))]);
    assert_eq!(
        mailbox.set_max_frame(1518),
        Err(MailboxError::Garbled(OK | 2))
    );
}

#[test]
fn from_version_1_5_the_mailbox_is_kept_until_the_pf_took_the_message() {
    let (mut mailbox, pf) = talk(vec![
        (&[0x08, 6], answer(&[OK | 8])),
        (&[0x05, 1518], answer(&[OK | 5])),
    ]);
    assert_eq!(mailbox.negotiate(), Ok(Api::V1_5));
    assert_eq!(mailbox.set_max_frame(1518), Ok(()));
    assert_eq!(pf.0.lock().unwrap().state & regs::MAILBOX_VFU, 0);
}

#[test]
fn thirty_multicast_hashes_fill_the_mailbox_and_more_are_left_out() {
    let mut expect = vec![0x001E_0003];
    expect.extend((0..15).map(|i| (2 * i + 1) << 16 | (2 * i)));
    let (mut mailbox, pf) = talk(vec![(&expect, answer(&[OK | 3]))]);
    let hashes: Vec<u16> = (0..40).collect();
    assert_eq!(mailbox.set_multicast(&hashes), Ok(()));
    assert!(done(&pf));
}

#[test]
fn multicast_hashes_are_those_of_the_pf() {
    assert_eq!(multicast_hash([0x33, 0x33, 0, 0, 0, 1], 0), 0x010);
    assert_eq!(
        multicast_hash([0x33, 0x33, 0xFF, 0x82, 0x59, 0x10], 0),
        0x105
    );
    let mac = [1, 0, 0x5E, 0, 0xAB, 0xCD];
    assert_eq!(multicast_hash(mac, 1), (0xAB >> 3 | 0xCD << 5) & 0xFFF);
    assert_eq!(multicast_hash(mac, 2), (0xAB >> 2 | 0xCD << 6) & 0xFFF);
    assert_eq!(multicast_hash(mac, 3), (0xAB | 0xCD << 8) & 0xFFF);
}

#[test]
fn a_device_that_is_gone_answers_nothing_and_blocks_nothing() {
    struct Void;
    impl Registers for Void {
        fn read(&self, _: u32) -> u32 {
            GONE
        }
        fn write(&self, _: u32, _: u32) {}
    }
    let mut mailbox = Mailbox::new(Bar::called(Arc::new(Void)), Arc::new(Still));
    assert_eq!(mailbox.reset(), Err(MailboxError::Gone));
    assert_eq!(mailbox.listen(), Err(MailboxError::Gone));
    assert!(!mailbox.pf_in_reset());
}
