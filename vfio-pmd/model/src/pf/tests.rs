use super::*;

fn pf(grant: VfPolicy) -> Pf {
    Pf::new(PfPolicy::default(), vec![grant.clone(), grant])
}

fn ask(pf: &mut Pf, words: &[u32]) -> Vec<u32> {
    let mut message = [0; 16];
    message[..words.len()].copy_from_slice(words);
    pf.answer(0, &message)
}

/// Reset and negotiation, as every driver begins.
fn begun(grant: VfPolicy) -> Pf {
    let mut pf = pf(grant);
    ask(&mut pf, &[RESET]);
    assert_eq!(ask(&mut pf, &[NEGOTIATE, 5])[0], 0xa000_0008);
    pf
}

const GIVEN: Mac = [0x02, 0x11, 0x22, 0x33, 0x44, 0x55];

fn given() -> VfPolicy {
    VfPolicy {
        mac: Some(GIVEN),
        ..VfPolicy::default()
    }
}

#[test]
fn answers_the_probe_of_linux_as_a_real_pf_does() {
    let mut pf = pf(given());
    assert_eq!(
        ask(&mut pf, &[RESET]),
        [0x8000_0001, 0x3322_1102, 0x5544, 0]
    );
    for api in [8, 7, 6] {
        assert_eq!(ask(&mut pf, &[NEGOTIATE, api])[0], 0x6000_0008);
    }
    assert_eq!(ask(&mut pf, &[NEGOTIATE, 5])[0], 0xa000_0008);
    assert_eq!(ask(&mut pf, &[GET_QUEUES])[..5], [0xa000_0009, 4, 4, 0, 0]);
    assert_eq!(ask(&mut pf, &[XCAST_MODE, 1])[..2], [0xa000_000c, 1]);
    assert_eq!(ask(&mut pf, &[SET_LPE, 0x5ee])[0], 0xa000_0005);
}

#[test]
fn before_a_reset_everything_is_refused_in_one_word_without_leave_to_send() {
    let mut pf = pf(given());
    assert_eq!(ask(&mut pf, &[NEGOTIATE, 5]), [0x4000_0008]);
    ask(&mut pf, &[RESET]);
    pf.forget(0);
    assert_eq!(ask(&mut pf, &[SET_LPE, 1518]), [0x4000_0005]);
    assert_eq!(pf.ping(0), 0x100);
}

#[test]
fn without_an_administrative_address_the_reset_is_refused_and_works() {
    let mut pf = pf(VfPolicy::default());
    assert_eq!(ask(&mut pf, &[RESET])[..3], [0x4000_0001, 0, 0]);
    assert_eq!(
        ask(&mut pf, &[SET_MAC, 0x0300_0002, 0x0504])[0],
        0xa000_0002
    );
    assert_eq!(pf.vfs[0].mac, Some([2, 0, 0, 3, 4, 5]));
    // A group address is nobody's.
    assert_eq!(
        ask(&mut pf, &[SET_MAC, 0x0300_0001, 0x0504])[0],
        0x6000_0002
    );
}

#[test]
fn a_given_address_is_replaced_only_by_a_trusted_vf() {
    let other = [SET_MAC, 0x0300_0002, 0x0504];
    assert_eq!(ask(&mut begun(given()), &other)[0], 0x6000_0002);
    assert_eq!(
        ask(&mut begun(given()), &[SET_MAC, 0x3322_1102, 0x5544])[0],
        0xa000_0002
    );
    let trusted = VfPolicy {
        trusted: true,
        ..given()
    };
    assert_eq!(ask(&mut begun(trusted), &other)[0], 0xa000_0002);
}

#[test]
fn macvlans_are_a_pool_and_switch_the_spoof_check_off() {
    let mut pf = begun(VfPolicy::default());
    assert!(pf.vfs[0].spoof_check);
    let room = pf.macvlan_pool() as u32;
    assert_eq!(room, 128 - 16 - 2);
    for n in 0..room {
        let index = if n == 0 { 1 } else { 2 };
        assert_eq!(
            ask(&mut pf, &[SET_MACVLAN | index << 16, 0x02, n])[0] & NACK,
            0,
            "{n}"
        );
    }
    assert!(!pf.vfs[0].spoof_check);
    assert_ne!(
        ask(&mut pf, &[SET_MACVLAN | 2 << 16, 0x02, 999])[0] & NACK,
        0
    );
    ask(&mut pf, &[SET_MACVLAN]);
    assert_eq!(pf.vfs[0].macvlans, [] as [Mac; 0]);
    let mut refused = begun(given());
    assert_ne!(
        ask(&mut refused, &[SET_MACVLAN | 1 << 16, 0x02, 1])[0] & NACK,
        0
    );
}

#[test]
fn cast_modes_beyond_multicast_need_trust_and_promiscuous_is_never_had() {
    let mut pf = begun(VfPolicy::default());
    for asked in [2, 3] {
        assert_eq!(ask(&mut pf, &[XCAST_MODE, asked])[..2], [0xa000_000c, 1]);
    }
    let mut trusted = begun(VfPolicy {
        trusted: true,
        ..VfPolicy::default()
    });
    assert_eq!(ask(&mut trusted, &[XCAST_MODE, 2])[..2], [0xa000_000c, 2]);
    assert_eq!(ask(&mut trusted, &[XCAST_MODE, 3])[0], 0x6000_000c);
    assert_eq!(trusted.vfs[0].cast, CastMode::AllMulti);
}

#[test]
fn a_jumbo_pf_keeps_the_receive_path_closed_until_the_vf_agrees() {
    let policy = PfPolicy {
        mtu: 9000,
        ..PfPolicy::default()
    };
    let mut pf = Pf::new(policy, vec![VfPolicy::default()]);
    ask(&mut pf, &[RESET]);
    assert!(!pf.vfs[0].receives);
    // An old driver cannot live beside jumbo frames.
    assert_eq!(ask(&mut pf, &[SET_LPE, 1518])[0], 0x6000_0005);
    ask(&mut pf, &[NEGOTIATE, 4]);
    assert_eq!(ask(&mut pf, &[SET_LPE, 1518])[0], 0xa000_0005);
    assert!(pf.vfs[0].receives);
    assert_eq!(ask(&mut pf, &[SET_LPE, 9728])[0], 0xa000_0005);
    assert_eq!(ask(&mut pf, &[SET_LPE, 9729])[0], 0x6000_0005);
    assert_eq!(pf.frame_max, 9728);
}

#[test]
fn jumbo_frames_need_a_jumbo_pf() {
    let mut pf = begun(VfPolicy::default());
    assert_eq!(ask(&mut pf, &[SET_LPE, 9018])[0], 0x6000_0005);
    assert!(!pf.vfs[0].receives, "the refusal closes the receive path");
}

#[test]
fn a_reset_forgets_filters_and_returns_to_the_oldest_protocol() {
    let mut pf = begun(VfPolicy::default());
    ask(&mut pf, &[SET_VLAN | 1 << 16, 7]);
    ask(&mut pf, &[SET_MULTICAST | 2 << 16, 0x0010_0105]);
    assert_eq!(pf.vfs[0].multicast, BTreeSet::from([0x10, 0x105]));
    ask(&mut pf, &[SET_MACVLAN | 1 << 16, 0x02, 1]);
    ask(&mut pf, &[RESET]);
    let state = &pf.vfs[0];
    assert!(state.vlans.is_empty() && state.multicast.is_empty() && state.macvlans.is_empty());
    assert_eq!(state.api, Api::V10);
    // Without 1.1 there is no question for queues.
    assert_eq!(ask(&mut pf, &[GET_QUEUES])[0], 0x6000_0009);
}

#[test]
fn a_port_vlan_refuses_vlans_of_the_vfs_own() {
    let mut pf = begun(VfPolicy {
        port_vlan: Some(100),
        ..VfPolicy::default()
    });
    assert_ne!(ask(&mut pf, &[SET_VLAN | 1 << 16, 7])[0] & NACK, 0);
    assert_eq!(ask(&mut pf, &[GET_QUEUES])[3], 1);
}

#[test]
fn rss_is_told_only_where_the_administrator_allows_it() {
    let mut pf = begun(VfPolicy::default());
    assert_ne!(ask(&mut pf, &[GET_RETA])[0] & NACK, 0);
    let mut open = begun(VfPolicy {
        query_rss: true,
        ..VfPolicy::default()
    });
    assert_eq!(ask(&mut open, &[GET_RETA])[1], 0x4444_4444);
    assert_eq!(
        ask(&mut open, &[GET_RSS_KEY])[1],
        u32::from_le_bytes([0x6d, 0x5a, 0x56, 0xda])
    );
}

#[test]
fn multicast_hashes_are_those_of_real_traces() {
    assert_eq!(multicast_hash(0, [0x33, 0x33, 0, 0, 0, 1]), 0x010);
    assert_eq!(
        multicast_hash(0, [0x33, 0x33, 0xff, 0x82, 0x59, 0x10]),
        0x105
    );
}
