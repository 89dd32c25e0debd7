//! Several samples as one figure with its spread.

use crate::sentinel::median;

/// Several samples of one thing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) n: usize,
}

impl Spread {
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.collect();
        let median = median(&mut values)?;
        Some(Self {
            median,
            min: values[0],
            max: values[values.len() - 1],
            n: values.len(),
        })
    }

    /// `15.8 [15.6–16.0] n=2`
    pub(crate) fn show(&self, unit: &str) -> String {
        format!(
            "{}{unit} [{}–{}] n={}",
            digits(self.median),
            digits(self.min),
            digits(self.max),
            self.n
        )
    }
}

/// Three digits, as many as these measurements carry.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        large if large >= 99.95 => format!("{value:.0}"),
        middle if middle >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_shown_with_its_count() {
        let spread = Spread::of([15.6, 16.0, 15.8].into_iter()).unwrap();
        assert_eq!(spread.show(" µs"), "15.8 µs [15.6–16.0] n=3");
        assert_eq!(Spread::of(std::iter::empty()), None);
    }

    #[test]
    fn numbers_carry_three_digits() {
        assert_eq!(
            ["0.78", "9.99", "10.0", "99.9", "100"],
            [0.78, 9.99, 9.996, 99.91, 99.96].map(digits)[..]
        );
    }
}
