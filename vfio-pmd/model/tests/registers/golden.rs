//! What Linux's and DPDK's drivers said to the model in a guest, word for word, and what it must go on answering.
//!
//! `golden/*.txt` were recorded from those drivers (`vf-model serve`, command `conversation`) on VFs with a trusted PF's default
//! policy: MTU 9000, mailbox protocol up to 1.4, four queues. The answers were right: the drivers went on to carry frames.

use super::*;

fn replay(text: &str, mac: u8) {
    let mut nic = Config::for_tests(vec![VfPolicy {
        mac: Some([2, 0, 0, 0, 0, mac]),
        ..VfPolicy::default()
    }]);
    nic.pf.mtu = 9000;
    let bare = Bare::open(&Nic::new(nic), 0);
    let mut said = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words = |text: &str| -> Vec<u32> {
            text.split_whitespace()
                .map(|word| u32::from_str_radix(word, 16).unwrap())
                .collect()
        };
        let (request, answer) = line.split_once("->").unwrap();
        let (request, answer) = (words(request), words(answer));
        if request == [1] {
            // Every driver resets the function before it says so.
            bare.write(0x000, 1 << 26);
        }
        let got = bare.ask(&request).unwrap();
        assert_eq!(got[..answer.len()], answer, "{line}");
        said += 1;
    }
    assert!(said > 5, "an empty recording");
    bare.assert_clean();
}

#[test]
fn linux_hears_what_it_heard_when_it_carried_frames() {
    replay(include_str!("../golden/linux-6.1.txt"), 2);
}

#[test]
fn dpdk_hears_what_it_heard_when_it_carried_frames() {
    replay(include_str!("../golden/dpdk-25.11.txt"), 1);
}
