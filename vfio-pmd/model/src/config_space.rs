//! Configuration space: what a host needs to find the VF, its MSI-X vectors and its function-level reset.

/// Bytes of configuration space served.
pub(crate) const CONFIG_LEN: usize = 256;
/// BAR3 in bytes: the MSI-X table, and the pending bits from [`PBA`].
pub(crate) const BAR3_LEN: u64 = 0x4000;
const PBA: u32 = 0x2000;

const CAP_MSIX: u8 = 0x70;
const CAP_PCIE: u8 = 0xa0;
/// Device control of the PCI Express capability.
const DEVICE_CONTROL: usize = CAP_PCIE as usize + 8;
const FUNCTION_LEVEL_RESET: u8 = 0x80;

/// The configuration space of one VF.
#[derive(Clone)]
pub(crate) struct ConfigSpace([u8; CONFIG_LEN]);

impl Default for ConfigSpace {
    fn default() -> Self {
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &0x8086u16.to_le_bytes());
        put(0x02, &0x10edu16.to_le_bytes());
        put(0x06, &0x0010u16.to_le_bytes()); // there are capabilities
        put(0x08, &[1, 0, 0, 2]); // revision 1, Ethernet controller
        put(0x10, &4u32.to_le_bytes()); // BAR0: memory, 64 bits
        put(0x1c, &4u32.to_le_bytes()); // BAR3: memory, 64 bits
        put(0x2c, &0x8086u16.to_le_bytes());
        put(0x2e, &0x0003u16.to_le_bytes());
        put(0x34, &[CAP_MSIX]);
        let msix = CAP_MSIX as usize;
        put(msix, &[0x11, CAP_PCIE, crate::regs::VECTORS as u8 - 1, 0]);
        put(msix + 4, &3u32.to_le_bytes()); // table: BAR3 from 0
        put(msix + 8, &(PBA | 3).to_le_bytes());
        let pcie = CAP_PCIE as usize;
        put(pcie, &[0x10, 0, 0x02, 0]); // version 2, endpoint
        put(pcie + 4, &(1u32 << 28).to_le_bytes()); // can be reset at function level
        Self(space)
    }
}

impl ConfigSpace {
    /// Reads; what lies outside reads as zeros.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        for (at, byte) in (offset..).zip(into) {
            *byte = self.0.get(at as usize).copied().unwrap_or(0);
        }
    }

    /// Writes the few bytes that are not read-only; true if that asks for a function-level reset.
    #[must_use]
    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) -> bool {
        let mut reset = false;
        for (at, byte) in (offset..).zip(from) {
            let at = at as usize;
            match at {
                // Command, and the enable bits of MSI-X.
                0x04 | 0x05 => self.0[at] = *byte,
                _ if at == CAP_MSIX as usize + 3 => self.0[at] = byte & 0xc0,
                _ if at == DEVICE_CONTROL + 1 => {
                    reset |= byte & FUNCTION_LEVEL_RESET != 0;
                    self.0[at] = byte & !FUNCTION_LEVEL_RESET;
                }
                DEVICE_CONTROL => self.0[at] = *byte,
                _ => {}
            }
        }
        reset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_over_the_capabilities_finds_msix_and_reset_and_ends() {
        let space = ConfigSpace::default();
        let byte = |at: usize| space.0[at];
        let (mut at, mut found) = (usize::from(byte(0x34)), Vec::new());
        while at != 0 {
            found.push(byte(at));
            at = usize::from(byte(at + 1));
        }
        assert_eq!(found, [0x11, 0x10]);
    }

    #[test]
    fn device_control_resets_and_does_not_keep_the_bit() {
        let mut space = ConfigSpace::default();
        assert!(!space.write(0x04, &[6, 0]));
        assert!(space.write(0xa8, &0x8810u16.to_le_bytes()));
        let mut word = [0; 2];
        space.read(0xa8, &mut word);
        assert_eq!(u16::from_le_bytes(word), 0x0810);
        // Identity is read-only.
        assert!(!space.write(0, &[0; 4]));
        space.read(0, &mut word);
        assert_eq!(word, [0x86, 0x80]);
        space.read(255, &mut [0; 8]);
    }
}
