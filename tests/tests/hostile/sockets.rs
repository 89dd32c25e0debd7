//! H1 to H20: the control socket.

use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ringway::guest::messages::addresses;
use ringway::virtio::own_mem::OwnMem;
use ringway::virtio::ring::feature;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use testkit::process::{Launch, wait_until};

use super::api::{self, PATIENCE};
use super::case::Case;
use super::talk::{NEED_REPLY, PLAIN, Talk, event, message, pair, req, times};
use super::x::X;

/// A message is refused: by an answer where the attacker asked for one, else by the end of its visit.
pub(super) fn is_refused(
    x: &X<'_>,
    talk: &Talk,
    (request, payload): (u32, &[u8]),
    fds: &[std::os::fd::BorrowedFd<'_>],
    words: &[&str],
) -> Result<()> {
    // Half of the seeds ask how it went.
    if x.seed & 1 == 0 {
        return match talk.ask(request, payload, fds)? {
            Some(0) => anyhow::bail!("message {request} was carried out"),
            Some(_) => Ok(()),
            None => x.is_put_out(words),
        };
    }
    talk.say_with(request, payload, fds)?;
    x.is_put_out(words)
}

/// A connection on which features were agreed upon.
fn shaken(x: &X<'_>) -> Result<Talk> {
    let talk = x.connect()?;
    talk.shake(true, 0)?;
    Ok(talk)
}

#[test]
pub(super) fn h00_a_guest_that_behaves_costs_nobody_anything() -> Result<()> {
    Case::of("H0").beside().run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        x.gets_frames(100, 200)?;
        x.innocents_go_on()?;
        wild.guest.detach()?;
        Ok(())
    })
}

#[test]
pub(super) fn h01_half_a_message_is_waited_for_one_second_by_its_own_port_alone() -> Result<()> {
    Case::of("H1").at_once(20).run(|x| {
        let whole = message(req::SET_FEATURES, PLAIN, &[0; 8]);
        let cut = 1 + x.below(whole.len() as u64 - 1) as usize;
        let talk = x.connect()?;
        talk.bytes(&whole[..cut], &[])?;
        x.is_put_out(&["did not end it"])
    })
}

#[test]
pub(super) fn h02_messages_in_pieces_and_several_in_one_are_put_together_rightly() -> Result<()> {
    Case::of("H2").at_once(10).run(|x| {
        let talk = x.connect()?;
        let fd = event()?;
        // Descriptors may come with any byte of a message.
        let call = message(req::SET_VRING_CALL, PLAIN, &pair(0, 0));
        let ask = message(req::GET_FEATURES, PLAIN, &[]);
        for _ in 0..5 {
            let cut = 1 + x.below(call.len() as u64 - 1) as usize;
            talk.bytes(&call[..cut], &[])?;
            std::thread::sleep(Duration::from_millis(x.below(10)));
            talk.bytes(&call[cut..], &[fd.as_fd()])?;
            let mut rest = ask.as_slice();
            while !rest.is_empty() {
                let some = 1 + x.below(rest.len() as u64) as usize;
                talk.bytes(&rest[..some], &[])?;
                rest = &rest[some..];
            }
            ensure!(talk.hear()?.is_some(), "no answer to a message in pieces");
        }
        talk.bytes(&ask.repeat(10), &[])?;
        for _ in 0..10 {
            ensure!(talk.hear()?.is_some(), "no answer to one of ten");
        }
        Ok(())
    })
}

#[test]
pub(super) fn h03_sizes_that_no_message_has_end_the_visit() -> Result<()> {
    Case::of("H3").run(|x| {
        let fd = event()?;
        let size = x.one_of(&[u32::MAX, 4097, 0x8000_0000, 0, 3]);
        let mut bytes = message(req::SET_FEATURES, PLAIN, &[]);
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
        bytes.extend([0; 3]);
        let talk = x.connect()?;
        talk.bytes(&bytes, &times(&fd, 8))?;
        x.is_put_out(&["at fault"])
    })
}

#[test]
pub(super) fn h04_unknown_messages_and_flags_are_refused() -> Result<()> {
    Case::of("H4").run(|x| {
        let talk = shaken(x)?;
        let strange = x.one_of(&[
            0,
            19 + 20 * 5,
            25,
            26,
            33,
            41,
            46,
            100,
            0x7fff_ffff,
            u32::MAX,
        ]);
        match x.below(3) {
            0 => is_refused(x, &talk, (strange, &[0; 8]), &[], &["at fault"]),
            1 => {
                let flags = x.one_of(&[0, 2, 3, PLAIN | 16, PLAIN | 1 << 31]);
                talk.bytes(&message(req::SET_OWNER, flags, &[]), &[])?;
                x.is_put_out(&["at fault"])
            }
            _ => {
                talk.bytes(&message(req::GET_FEATURES, PLAIN | 4, &[0; 8]), &[])?;
                x.is_put_out(&["nobody asked for"])
            }
        }
    })
}

/// A payload as its message has it, with numbers of any kind in it.
fn any_message(x: &mut X<'_>, memory: &OwnMem) -> (u32, Vec<u8>) {
    let request = 1 + x.below(18) as u32;
    let index = x.one_of(&[0, 1, 0, 1, 2, 255]);
    let number = x.one_of(&[0, 1, 64, 256, 0xffff]);
    let payload = match request {
        req::SET_FEATURES => x.one_of(&[1u64 << 32, 5 << 30, 0]).to_le_bytes().to_vec(),
        req::SET_PROTOCOL_FEATURES => x.one_of(&[0u64, 1, 9]).to_le_bytes().to_vec(),
        req::SET_MEM_TABLE => ringway::guest::messages::mem_table(&[super::talk::whole(memory)]),
        req::SET_VRING_NUM | req::SET_VRING_BASE | req::GET_VRING_BASE | req::SET_VRING_ENABLE => {
            pair(index, number).to_vec()
        }
        req::SET_VRING_ADDR => {
            let at = memory.uva() + 4096 * x.below(8);
            addresses(index, at, at + 8192, at + 4096)
        }
        req::SET_VRING_KICK | req::SET_VRING_CALL | req::SET_VRING_ERR => pair(index, 0).to_vec(),
        _ => Vec::new(),
    };
    (request, payload)
}

#[test]
pub(super) fn h05_messages_in_any_order_have_an_outcome() -> Result<()> {
    Case::of("H5").run(|x| {
        for _ in 0..5 {
            x.port_again("")?;
            let memory = OwnMem::new(1 << 20, 0x1000_0000, false)?;
            let (talk, fd) = (x.connect()?, event()?);
            if x.below(2) == 0 {
                talk.shake(x.below(2) == 0, feature::RING_PACKED * x.below(2))?;
            }
            for _ in 0..40 {
                let (request, payload) = any_message(x, &memory);
                let fds = match request {
                    req::SET_MEM_TABLE => vec![memory.fd()],
                    req::SET_VRING_KICK | req::SET_VRING_CALL => vec![fd.as_fd()],
                    _ => Vec::new(),
                };
                if !talk.bytes(&message(request, PLAIN, &payload), &fds)? {
                    break;
                }
            }
            // Either it is put out, or the connection is sound.
            if talk.say(req::GET_FEATURES, &[])? && talk.hear()?.is_none() {
                x.is_put_out(&[
                    "at fault",
                    "no virtqueue",
                    "ring",
                    "legacy",
                    "refused",
                    "queue",
                ])?;
            }
        }
        Ok(())
    })
}

#[test]
pub(super) fn h06_rings_that_the_port_does_not_have_are_refused() -> Result<()> {
    Case::of("H6").run(|x| {
        let (talk, fd) = (shaken(x)?, event()?);
        let index = x.one_of(&[2, 3, 255, 0x1_0000, u32::MAX]);
        let (request, payload) = match x.below(8) {
            0 => (req::SET_VRING_NUM, pair(index, 256).to_vec()),
            1 => (req::SET_VRING_ADDR, addresses(index, 0, 0, 0)),
            2 => (req::SET_VRING_BASE, pair(index, 0).to_vec()),
            3 => (req::SET_VRING_ENABLE, pair(index, 1).to_vec()),
            4 => (req::SET_VRING_KICK, pair(index.min(255), 0).to_vec()),
            5 => (req::SET_VRING_CALL, pair(index.min(255), 0).to_vec()),
            6 => (req::SET_VRING_ERR, pair(index.min(255), 0).to_vec()),
            _ => {
                talk.say(req::GET_VRING_BASE, &pair(index, 0))?;
                return x.is_put_out(&["queue pairs"]);
            }
        };
        let with_fd = matches!(
            request,
            req::SET_VRING_KICK | req::SET_VRING_CALL | req::SET_VRING_ERR
        );
        let fds = if with_fd { vec![fd.as_fd()] } else { vec![] };
        is_refused(x, &talk, (request, &payload), &fds, &["queue pairs"])
    })
}

#[test]
pub(super) fn h07_features_that_were_not_offered_are_refused() -> Result<()> {
    Case::of("H7").run(|x| {
        let talk = shaken(x)?;
        let bit = x.one_of(&[0, 1, 5, 7, 11, 22, 26, 33, 36, 40, 63]);
        let (request, bits) = match x.below(2) {
            0 => (req::SET_FEATURES, 5 << 30 | 1u64 << bit),
            _ => (
                req::SET_PROTOCOL_FEATURES,
                9 | 1u64 << x.one_of(&[1, 2, 5, 8, 12, 63]),
            ),
        };
        is_refused(
            x,
            &talk,
            (request, &bits.to_le_bytes()),
            &[],
            &["not offered"],
        )
    })
}

#[test]
pub(super) fn h08_a_flood_of_messages_is_answered_at_a_rate_and_nobody_else_waits() -> Result<()> {
    Case::of("H8").at_once(10).seeds(10).run(|x| {
        let talk = shaken(x)?;
        let flood = x.one_of(&[req::SET_OWNER, req::RESET_OWNER, req::SET_VRING_NUM]);
        let payload = match flood {
            req::SET_VRING_NUM => pair(0, 64).to_vec(),
            _ => Vec::new(),
        };
        let sent = (0..2000).try_for_each(|_| match talk.say(flood, &payload) {
            Ok(true) => Ok(()),
            _ => Err(()),
        });
        let goes_on = sent.is_ok() && talk.say(req::GET_FEATURES, &[])? && talk.hear()?.is_some();
        if !goes_on {
            x.is_put_out(&["messages"])?;
        }
        Ok(())
    })
}

#[test]
pub(super) fn h09_ring_sizes_that_do_not_exist_are_refused_running_or_not() -> Result<()> {
    Case::of("H9").run(|x| {
        let wild = x.attach(x.plain())?;
        let talk = wild.talk()?;
        let (ring, size) = (
            x.below(2) as u32,
            x.one_of(&[0, 3, 255, 32_769, 65_535, u32::MAX]),
        );
        is_refused(
            x,
            &talk,
            (req::SET_VRING_NUM, &pair(ring, size)),
            &[],
            &["size"],
        )
    })
}

#[test]
pub(super) fn h09_a_size_that_changes_while_the_ring_runs_is_taken_between_two_turns() -> Result<()>
{
    Case::of("H9 running").run(|x| {
        let mut wild = x.attach(x.plain())?;
        wild.announce(x)?;
        let talk = wild.talk()?;
        for _ in 0..20 {
            let size = x.one_of(&[1, 2, 64, 128, 256, 512, 32_768]);
            if !talk.say(req::SET_VRING_NUM, &pair(x.below(2) as u32, size))? {
                break;
            }
        }
        // A larger ring may reach out of its memory, a smaller one may have more pending than it holds.
        if talk.say(req::GET_FEATURES, &[])? && talk.hear()?.is_none() {
            x.is_put_out(&["ring", "index", "chain", "descriptor"])?;
        }
        x.innocents_go_on()
    })
}

#[test]
pub(super) fn h10_ring_addresses_outside_the_memory_or_askew_are_refused() -> Result<()> {
    Case::of("H10").run(|x| {
        let wild = x.attach(x.plain())?;
        let (talk, memory) = (wild.talk()?, wild.memory()?);
        let (start, end) = (memory.uva(), memory.uva() + memory.len());
        let bad = x.one_of(&[
            start + 8,
            start + 1,
            start - 16,
            end,
            end - 1,
            end - 16,
            0,
            0xffff_8000_0000_0000,
            !15,
        ]);
        let (good, ring) = (start, x.below(2) as u32);
        let payload = match x.below(3) {
            0 => addresses(ring, bad, good, good),
            // Two of the three need 4 and 2 bytes only: nothing is askew there at 8.
            1 => addresses(ring, good, if bad == start + 8 { end } else { bad }, good),
            _ => addresses(ring, good, good, if bad == start + 8 { end } else { bad }),
        };
        let words = ["outside", "misaligned", "ring", "at fault"];
        is_refused(x, &talk, (req::SET_VRING_ADDR, &payload), &[], &words)
    })
}

#[test]
pub(super) fn h11_any_ring_base_harms_its_own_port_alone() -> Result<()> {
    Case::of("H11").run(|x| {
        let mut wild = x.attach(x.options())?;
        wild.announce(x)?;
        let talk = wild.talk()?;
        let base = x.one_of(&[0xffff, 1 << 15, 257, 255, 0x8000_0101, u32::MAX, 1000]);
        talk.say(req::SET_VRING_BASE, &pair(x.below(2) as u32, base))?;
        let mut other = [0; 60];
        other[..6].copy_from_slice(&[2; 6]);
        other[6..12].copy_from_slice(&x.mac());
        wild.queues.tx.send(1, |slot| {
            slot.write(0, &other);
            60
        });
        wild.queues.tx.kick_anyway();
        x.gets_frames(300, 60)?;
        if talk.say(req::GET_FEATURES, &[])? && talk.hear()?.is_none() {
            x.is_put_out(&["index", "base", "chain", "descriptor", "direction"])?;
        }
        Ok(())
    })
}

#[test]
pub(super) fn h12_h13_h15_what_was_not_offered_is_refused() -> Result<()> {
    Case::of("H12 H13 H15").run(|x| {
        let (talk, fd) = (shaken(x)?, event()?);
        let memory = OwnMem::new(4096, 0, false)?;
        let request = x.one_of(&[
            req::SET_LOG_BASE,
            req::SET_LOG_FD,
            req::GET_INFLIGHT_FD,
            req::SET_INFLIGHT_FD,
            req::SET_BACKEND_REQ_FD,
        ]);
        let number = x.one_of(&[0, 1, 4096, u64::MAX, u64::MAX - 4095]);
        let payload: Vec<u8> = [number, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let fds = match x.below(3) {
            0 => vec![],
            1 => vec![fd.as_fd()],
            _ => vec![memory.fd(); 2],
        };
        is_refused(
            x,
            &talk,
            (request, &payload),
            &fds,
            &["not offered", "at fault"],
        )
    })
}

#[test]
pub(super) fn h14_who_does_not_read_answers_is_put_out() -> Result<()> {
    Case::of("H14").at_once(20).run(|x| {
        let talk = x.connect()?;
        talk.stream()
            .set_write_timeout(Some(Duration::from_millis(200)))?;
        let flags = x.one_of(&[PLAIN, NEED_REPLY]);
        for _ in 0..100_000 {
            if !talk.bytes(&message(req::GET_FEATURES, flags, &[]), &[])? {
                break;
            }
        }
        x.is_put_out(&["did not read"])
    })
}

#[test]
pub(super) fn h16_of_many_who_connect_one_is_served_and_the_others_are_sent_away() -> Result<()> {
    Case::of("H16").run(|x| {
        let first = shaken(x)?;
        let crowd: Vec<UnixStream> = (0..150)
            .map(|_| UnixStream::connect(x.socket()))
            .collect::<std::io::Result<_>>()?;
        for stream in &crowd {
            Talk::over(stream)?.wait_closed()?;
        }
        ensure!(
            first.say(req::GET_FEATURES, &[])?,
            "the first was sent away"
        );
        first.hear()?.context("the first was sent away")?;
        Ok(())
    })
}

#[test]
pub(super) fn h17_a_loop_of_connections_leaves_nothing_behind() -> Result<()> {
    Case::of("H17").run(|x| {
        for round in 0..150 {
            let talk = x.connect()?;
            match round % 3 {
                0 => {}
                1 => drop(talk.say(req::SET_OWNER, &[])?),
                _ => drop(talk.shake(false, 0)),
            }
        }
        Ok(())
    })
}

/// Not a test by itself: what [`h18_another_user_may_not_connect`] runs as that user.
#[test]
fn h18_helper_connects() {
    let Some(socket) = std::env::var_os("HOSTILE_CONNECT") else {
        return;
    };
    match UnixStream::connect(socket) {
        Ok(_) => println!("\nlet in"),
        Err(error) => println!("\n{:?}", error.kind()),
    }
}

#[test]
fn h18_another_user_may_not_connect() -> Result<()> {
    testkit::require!(testkit::skip::root());
    Case::of("H18").at_once(1).seeds(2).run(|x| {
        let mine = std::env::current_exe()?;
        // A copy where that user can run it.
        let theirs = x.rig.dir.join("connect");
        std::fs::copy(mine, &theirs)?;
        let mut launch = Launch::new(
            "somebody-else",
            [
                theirs.as_os_str(),
                "hostile::sockets::h18_helper_connects".as_ref(),
                "--exact".as_ref(),
                "--nocapture".as_ref(),
            ],
        );
        launch.uid = Some(65_534);
        launch.env = vec![("HOSTILE_CONNECT".into(), x.socket().display().to_string())];
        let mut process = launch.start()?;
        let said = process.wait_for(0, PATIENCE, |text| text.contains("test result"))?;
        std::fs::remove_file(theirs)?;
        ensure!(said.contains("PermissionDenied"), "uid 65534: {said}");
        let port = api::port(&x.rig.api, &x.port)?;
        ensure!(port.connects == 0, "somebody was let in");
        Ok(())
    })
}

#[test]
pub(super) fn h19_a_link_to_another_containers_socket_is_not_followed() -> Result<()> {
    Case::of("H19").run(|x| {
        let mut victim = x.attach(x.options())?;
        victim.announce(x)?;
        // The port of a second container, which listens by itself, and whose socket is a link to the first one's.
        let (name, path) = (
            format!("y{}", x.port),
            x.rig.dir.join(format!("y{}", x.port)),
        );
        let aim = if x.below(2) == 0 {
            x.socket()
        } else {
            x.rig.dir.join("a.sock")
        };
        symlink(aim, &path)?;
        let spec = format!("vhost-user:{name},socket={},mode=client", path.display());
        api::add_port(&x.rig.api, &spec)?;
        let why = api::wait_put_out(&x.rig.api, &name)?;
        ensure!(why.contains("symbolic link"), "{why}");
        ensure!(victim.guest.connected(), "the victim was disconnected");
        api::del_port(&x.rig.api, &name)?;
        std::fs::remove_file(path)?;
        Ok(())
    })
}

#[test]
pub(super) fn h20_what_is_no_socket_is_refused_without_a_wait() -> Result<()> {
    Case::of("H20").run(|x| {
        let path = x.socket();
        api::del_port(&x.rig.api, &x.port)?;
        let what = x.below(4);
        match what {
            0 => mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0)?,
            1 => std::fs::create_dir(&path)?,
            2 => std::fs::write(&path, "no socket")?,
            _ => symlink("/dev/zero", &path)?,
        }
        x.add_port(",mode=client")?;
        x.is_put_out(&["is no socket", "symbolic link"])?;
        // And in a loop: there, gone, there.
        for _ in 0..100 {
            let aside = path.with_extension("aside");
            std::fs::rename(&path, &aside)?;
            std::fs::rename(&aside, &path)?;
        }
        x.innocents_go_on()?;
        api::del_port(&x.rig.api, &x.port)?;
        match what {
            1 => std::fs::remove_dir(&path)?,
            _ => std::fs::remove_file(&path)?,
        }
        x.add_port("")?;
        wait_until("the socket", PATIENCE, || path.exists())
    })
}
