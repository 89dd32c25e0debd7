//! Ringway
