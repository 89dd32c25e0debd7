//! The binary search for the highest rate that passes.

use anyhow::Result;

/// How to search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// A rate near the one that is looked for.
    pub(crate) start: f64,
    /// Ends when the rate is known to this share.
    pub(crate) resolution: f64,
    /// A rate that failed is tried again so often.
    pub(crate) repeat: u32,
}

/// No rate below this share of the start is tried.
const LEAST: f64 = 1.0 / 1024.0;
/// Nor one above this multiple.
const MOST: f64 = 8.0;

/// The highest rate that `passes`; none if none does.
pub(crate) fn find(
    search: &Search,
    mut passes: impl FnMut(f64) -> Result<bool>,
) -> Result<Option<f64>> {
    let mut tried = |rate| -> Result<bool> {
        for _ in 0..=search.repeat {
            if passes(rate)? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    let (mut low, mut high) = (0.0, 0.0);
    let mut rate = search.start;
    // 1. Where a rate passes and another fails.
    while low == 0.0 || high == 0.0 {
        if tried(rate)? {
            low = rate;
            if rate > search.start * MOST {
                return Ok(Some(low));
            }
            rate *= if high == 0.0 { 1.25 } else { 1.0 };
        } else {
            high = rate;
            if rate < search.start * LEAST {
                return Ok(None);
            }
            rate *= if low == 0.0 { 0.7 } else { 1.0 };
        }
    }
    // 2. Halve what lies between.
    while high - low > high * search.resolution {
        let middle = f64::midpoint(low, high);
        if tried(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Some(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(start: f64, limit: f64) -> (Option<f64>, u32) {
        let mut trials = 0;
        let search = Search {
            start,
            resolution: 0.01,
            repeat: 0,
        };
        let found = find(&search, |rate| {
            trials += 1;
            Ok(rate <= limit)
        });
        (found.unwrap(), trials)
    }

    #[test]
    fn finds_the_limit_from_above_and_below() {
        for limit in [1.1e6, 0.2e6, 0.95e6, 6e6] {
            let (found, trials) = search(1e6, limit);
            let found = found.unwrap();
            assert!(
                found <= limit && found > limit * 0.985,
                "{found} of {limit}"
            );
            assert!(trials < 24, "{trials}");
        }
    }

    #[test]
    fn ends_where_nothing_or_everything_passes() {
        assert_eq!(search(1e6, 0.0).0, None);
        assert!(search(1e6, f64::INFINITY).0.unwrap() >= 8e6);
    }

    #[test]
    fn a_single_failure_is_forgiven_where_trials_are_repeated() {
        let search = Search {
            start: 100.0,
            resolution: 0.01,
            repeat: 1,
        };
        let mut count = 0;
        let found = find(&search, |rate| {
            count += 1;
            Ok(rate <= 130.0 && count % 3 != 0)
        });
        assert!(found.unwrap().unwrap() > 120.0);
    }

    #[test]
    fn an_error_ends_the_search() {
        let search = Search {
            start: 1.0,
            resolution: 0.1,
            repeat: 5,
        };
        assert!(find(&search, |_| anyhow::bail!("gone")).is_err());
    }
}
