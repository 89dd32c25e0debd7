//! The soak: attackers of all kinds, guests that come and go, ports that are made and unmade and a configuration that is told
//! again, for as long as one likes, while the innocents must not lose a frame. `tests/run --soak MINUTES` runs it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use ringway::control::config::Config;
use ringway::control::cpu::HostCpus;
use ringway::control::state::{PortState, StatsReport};

use super::case::{Case, SOAK, alone};
use super::rig::Rig;
use super::usage::{Usage, wait_back_at};
use super::{api, descriptors, frames, headers, lifecycle, memory, rings, sockets};

/// How long, in seconds; without it nothing is run.
const TIME: &str = "HOSTILE_SOAK_SECONDS";
/// Attackers at the same time.
const ATTACKERS: u64 = 3;
/// What the switch may hold while they are at it: some 20 descriptors a port, a session and a guest's mappings each; at most 64
/// guests at once ([`lifecycle::h92_sixty_four_come_at_once_and_go_at_once`]), with two threads each.
const FDS_MAX: usize = 2000;
const GUEST_MAPS_MAX: usize = 1000;
const THREADS_MAX: usize = 300;
/// KiB a guest may have locked, times as many.
const LOCKED_MAX: u64 = 16 << 20;
/// KiB of its own memory that the allocator may have taken from one minute to the last.
const RSS_MAX: u64 = 4096;

/// Every attack but those that take the whole switch for themselves (a limit of descriptors, its end, the API's connections).
const ATTACKS: &[fn() -> Result<()>] = &[
    sockets::h00_a_guest_that_behaves_costs_nobody_anything,
    sockets::h01_half_a_message_is_waited_for_one_second_by_its_own_port_alone,
    sockets::h02_messages_in_pieces_and_several_in_one_are_put_together_rightly,
    sockets::h03_sizes_that_no_message_has_end_the_visit,
    sockets::h04_unknown_messages_and_flags_are_refused,
    sockets::h05_messages_in_any_order_have_an_outcome,
    sockets::h06_rings_that_the_port_does_not_have_are_refused,
    sockets::h07_features_that_were_not_offered_are_refused,
    sockets::h08_a_flood_of_messages_is_answered_at_a_rate_and_nobody_else_waits,
    sockets::h09_ring_sizes_that_do_not_exist_are_refused_running_or_not,
    sockets::h09_a_size_that_changes_while_the_ring_runs_is_taken_between_two_turns,
    sockets::h10_ring_addresses_outside_the_memory_or_askew_are_refused,
    sockets::h11_any_ring_base_harms_its_own_port_alone,
    sockets::h12_h13_h15_what_was_not_offered_is_refused,
    sockets::h14_who_does_not_read_answers_is_put_out,
    sockets::h16_of_many_who_connect_one_is_served_and_the_others_are_sent_away,
    sockets::h17_a_loop_of_connections_leaves_nothing_behind,
    sockets::h19_a_link_to_another_containers_socket_is_not_followed,
    sockets::h20_what_is_no_socket_is_refused_without_a_wait,
    descriptors::h21_any_message_may_bring_any_number_of_descriptors_and_none_stays,
    descriptors::h23_h29_memory_that_is_no_memfd_is_refused_before_anything_touches_it,
    descriptors::h25_a_call_descriptor_filled_to_the_brim_blocks_nobody,
    descriptors::h26_what_is_no_eventfd_is_refused_as_kick_and_as_call,
    descriptors::h27_kicks_without_end_cost_the_others_nothing,
    descriptors::h28_kick_and_call_may_be_missing_or_replaced_at_any_time,
    descriptors::h30_nested_graphs_of_sockets_are_closed_by_nobody_but_the_ports_own_thread,
    memory::h31_memory_that_is_truncated_costs_its_own_port_alone,
    memory::h31_memory_that_is_truncated_during_the_handshake,
    memory::h32_memory_that_comes_and_goes_is_never_trusted_again,
    memory::h33_h39_tables_that_cannot_be_are_refused_and_nothing_stays_mapped,
    memory::h39_more_regions_than_the_message_has_room_for,
    memory::h34_a_sparse_file_is_not_filled_at_our_expense,
    memory::h35_h36_holes_punched_under_rings_and_buffers_stay_the_attackers_own,
    memory::h40_tables_told_over_and_over_in_full_traffic,
    memory::h41_regions_that_overlap_are_refused,
    rings::h42_an_available_index_ahead_of_the_ring,
    rings::h43_descriptors_beyond_the_table,
    rings::h44_chains_without_end,
    rings::h46_indirect_tables_that_are_none,
    rings::h47_addresses_outside_the_memory_cost_that_frame_alone,
    rings::h48_a_buffer_that_ends_where_the_memory_ends_is_used_and_one_byte_more_is_not,
    rings::h49_buffers_that_are_rings_harm_their_owner_alone,
    rings::h50_frames_too_long_or_in_too_many_pieces_are_dropped,
    rings::h51_h52_headers_in_pieces_are_read_rightly_and_chains_of_headers_alone_dropped,
    rings::h53_receive_buffers_too_small_for_anything,
    rings::h53_receive_buffers_for_the_wrong_direction,
    rings::h54_ids_flags_and_events_of_a_packed_ring_at_random,
    rings::h55_one_bad_buffer_in_a_batch_does_not_cost_the_others,
    rings::h56_h57_what_the_switch_wrote_is_never_read_back_and_wishes_are_only_wishes,
    rings::h58_a_frame_that_needs_more_buffers_than_there_are_is_dropped_at_once,
    rings::h60_h82_h87_who_never_takes_its_frames_loses_them_and_nobody_waits,
    rings::h62_rings_switched_on_and_off_in_full_traffic,
    headers::h63_to_h68_whatever_a_sender_writes_there_the_receiver_sees_zeros,
    headers::h69_beyond_a_frame_nothing_is_written_into_its_buffer,
    frames::h71_a_flood_of_stations_evicts_nobody_but_their_own,
    frames::h73_sources_that_nobody_may_have_are_dropped,
    frames::h77_runts_are_dropped_and_short_frames_go_through_as_they_are,
    frames::h77_h78_tags_are_read_by_nobody_and_change_nothing,
    frames::h79_h97_link_local_protocols_are_never_forwarded,
    frames::h80_h81_who_sends_without_end_to_everybody_in_its_bridge_costs_the_others_no_frame,
    frames::h83_a_frame_for_its_own_port_is_not_reflected,
    frames::h84_stations_that_differ_in_few_bits_do_not_pile_up,
    lifecycle::h85_a_guest_that_dies_at_any_step_leaves_a_free_port,
    lifecycle::h86_a_port_deleted_under_a_guest_at_any_step,
    lifecycle::h91_the_newest_wins_only_if_the_one_that_is_there_is_dead,
    lifecycle::h92_sixty_four_come_at_once_and_go_at_once,
];

/// What has been done so far.
#[derive(Default)]
struct Done {
    attacks: AtomicU64,
    /// Ports that came and went, and stations written into the table.
    changes: AtomicU64,
    /// Whole configurations.
    reloads: AtomicU64,
    over: AtomicBool,
    /// A configuration names every port: while one is told, nobody else makes or unmakes any.
    ports: RwLock<()>,
}

/// Attacks one after the other, each with a seed nobody had before.
fn attack(rig: &Arc<Rig>, first: u64, done: &Done) -> Result<()> {
    let mut seed = first;
    while !done.over.load(Ordering::Relaxed) {
        seed = seed
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let attack = ATTACKS[(seed >> 33) as usize % ATTACKS.len()];
        let _ports = done.ports.read().unwrap_or_else(PoisonError::into_inner);
        SOAK.set(Some((rig.clone(), seed >> 20)));
        let ended = attack();
        SOAK.set(None);
        ended?;
        done.attacks.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Changes something all the time: a port that comes and goes, a static station, every ten seconds the whole configuration.
fn reconfigure(rig: &Rig, done: &Done) -> Result<()> {
    let socket = rig.dir.join("extra.sock");
    let spec = format!("vhost-user:extra,socket={},bridge=other", socket.display());
    let fixed = r#"{"mac":"02:00:00:00:ee:01","port":"extra"}"#;
    let mut told = Instant::now();
    while !done.over.load(Ordering::Relaxed) {
        {
            let _ports = done.ports.read().unwrap_or_else(PoisonError::into_inner);
            api::add_port(&rig.api, &spec)?;
            api::ask(&rig.api, "POST", "/v1/fdb", fixed)?;
            api::ask(&rig.api, "GET", "/metrics", "")?;
            api::ask(&rig.api, "GET", "/v1/fdb?limit=10", "")?;
            std::thread::sleep(Duration::from_millis(50));
            api::del_port(&rig.api, "extra")?;
            done.changes.fetch_add(1, Ordering::Relaxed);
        }
        if told.elapsed() > Duration::from_secs(10) {
            tell_again(rig, done)?;
            told = Instant::now();
        }
    }
    Ok(())
}

/// The same configuration with another age of stations and one port more, and then without it: nobody who is in both is touched.
fn tell_again(rig: &Rig, done: &Done) -> Result<()> {
    let _ports = done.ports.write().unwrap_or_else(PoisonError::into_inner);
    let host = HostCpus::read(Path::new("/"));
    let config = Config::load(&rig.dir.join("ringway.toml"), &host)?;
    let mut other = config.clone();
    other.fdb.age += 1 + done.reloads.load(Ordering::Relaxed) as u32 % 2;
    let mut port = testkit::ringway::server_port("told");
    port.socket = rig.dir.join("told.sock");
    other.ports.push(port);
    for config in [other, config] {
        let body = serde_json::json!({ "toml": config.to_toml(), "name": "soak" });
        api::ask(&rig.api, "POST", "/v1/reload", &body.to_string())?;
    }
    done.reloads.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// What must hold at any second.
fn holds(rig: &Rig, settled: Option<&Usage>, before: &StatsReport) -> Result<(Usage, StatsReport)> {
    // 1. The innocents move, and have lost nothing: their thread ends with the first frame that is missing, doubled or damaged.
    rig.innocents().wait_more(1)?;
    // 2. Nobody has put them out, and no frame of theirs was dropped.
    let stats = api::stats(&rig.api)?;
    for name in ["a", "b", "c", "d"] {
        let port = api::port(&rig.api, name)?;
        ensure!(
            port.state == PortState::Forwarding && port.counters.dropped_total() == 0,
            "the innocents' port {name} is {}, dropped {:?}",
            port.state,
            port.counters.dropped
        );
    }
    // 3. The books: read while frames move, so no more may be open than have moved meanwhile; at the end they balance exactly.
    let (total, last) = (&stats.total, &before.total);
    let (entered, left) = (
        total.received + total.replicated,
        total.sent + total.dropped_total(),
    );
    let moved = (total.received + total.replicated).checked_sub(last.received + last.replicated);
    let moved = moved.context("a counter went back")?;
    ensure!(
        total.sent >= last.sent && total.dropped_total() >= last.dropped_total(),
        "a counter went back: {last:?}, then {total:?}"
    );
    ensure!(
        entered.abs_diff(left) <= moved + 100_000,
        "{} frames in no book: {total:?}",
        entered.abs_diff(left)
    );
    // 4. The switch is there and holds no more than it may.
    let usage = Usage::of(rig.pid)?;
    ensure!(
        usage.fds < FDS_MAX
            && usage.guest_maps < GUEST_MAPS_MAX
            && usage.threads < THREADS_MAX
            && usage.locked < LOCKED_MAX,
        "{usage}"
    );
    if let Some(settled) = settled {
        ensure!(
            usage.rss < settled.rss + RSS_MAX,
            "{usage}; at first {settled}"
        );
    }
    Ok((usage, stats))
}

/// Each second: everything that must hold does.
fn watch(rig: &Rig, seconds: u64, done: &Done) -> Result<()> {
    let (began, mut settled) = (Instant::now(), None::<Usage>);
    let mut stats = api::stats(&rig.api)?;
    for second in 1..=seconds {
        let frames = rig.innocents().frames();
        let due = Duration::from_secs(second);
        while began.elapsed() < due && !done.over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let (usage, now) = holds(rig, settled.as_ref(), &stats)?;
        stats = now;
        // A minute, or a fifth of the time, to reach what so many attackers at once take.
        if second == (seconds / 5).clamp(1, 60) {
            settled = Some(usage);
        }
        if second % 10 == 0 {
            println!(
                "{second} s: {} attacks, {} changes, {} configurations, {} frames of the innocents ({} in the last second), {usage}, {} received, {} dropped",
                done.attacks.load(Ordering::Relaxed),
                done.changes.load(Ordering::Relaxed),
                done.reloads.load(Ordering::Relaxed),
                rig.innocents().frames(),
                rig.innocents().frames() - frames,
                stats.total.received,
                stats.total.dropped_total(),
            );
        }
        if done.over.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(())
}

/// Does its work and, whatever comes of it, ends the soak.
fn to_the_end(done: &Done, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let ended = work();
    if ended.is_err() {
        done.over.store(true, Ordering::Relaxed);
    }
    ended
}

#[test]
fn soak_everything_at_once() -> Result<()> {
    let Some(seconds) = std::env::var(TIME).ok() else {
        return Ok(()); // part of no ordinary run
    };
    let seconds: u64 = seconds.parse().context(TIME)?;
    let _alone = alone();
    let case = Case::of("soak").config(|config| config.fdb.capacity = 4096);
    let rig = Arc::new(Rig::start(&case)?);
    let (before, done) = (Usage::of(rig.pid)?, Done::default());
    let first = std::env::var("HOSTILE_FIRST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let first: u64 = first.unwrap_or_else(|| u64::from(std::process::id()));
    println!("soak of {seconds} s, first seed {first}");
    let ended = std::thread::scope(|scope| -> Result<()> {
        let (rig, done) = (&rig, &done);
        let mut hands: Vec<_> = (0..ATTACKERS)
            .map(|n| scope.spawn(move || to_the_end(done, || attack(rig, first + (n << 48), done))))
            .collect();
        hands.push(scope.spawn(move || to_the_end(done, || reconfigure(rig, done))));
        let watched = watch(rig, seconds, done);
        done.over.store(true, Ordering::Relaxed);
        hands
            .into_iter()
            .try_for_each(|hand| hand.join().map_err(|_| anyhow!("a panic"))?)?;
        watched
    });
    let limit = Usage {
        rss: before.rss + RSS_MAX,
        maps: before.maps + 400,
        ..before
    };
    let after = ended.and_then(|()| wait_back_at(rig.pid, &limit));
    let visits = rig.visits();
    let seen = Arc::into_inner(rig).context("the last one")?.end();
    let (after, seen) = match (after, seen) {
        (Ok(after), seen) => (after, seen?),
        // Why the innocents stood still is what they say themselves.
        (Err(first), Err(more)) => return Err(first.context(format!("{more:#}"))),
        (Err(first), Ok(_)) => return Err(first),
    };
    println!(
        "soak: {seconds} s, {} attacks ({visits} ports made, attacked, given to an honest guest and unmade), {} changes, {} configurations, \
         {} frames of the innocents, 0 lost; longest gap {:.1} ms; before: {before}; after: {after}",
        done.attacks.load(Ordering::Relaxed),
        done.changes.load(Ordering::Relaxed),
        done.reloads.load(Ordering::Relaxed),
        seen.frames,
        seen.gap,
    );
    Ok(())
}
