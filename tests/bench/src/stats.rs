//! Medians and spreads.

/// The results of several runs.
#[derive(Clone, Debug, Default)]
pub struct Runs(Vec<f64>);

impl FromIterator<f64> for Runs {
    fn from_iter<I: IntoIterator<Item = f64>>(runs: I) -> Self {
        let mut runs: Vec<f64> = runs.into_iter().collect();
        runs.sort_by(f64::total_cmp);
        Self(runs)
    }
}

impl Runs {
    /// Returns the value below which this share of the runs lies. NaN if there are no runs.
    pub fn quantile(&self, share: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// `median (quartile to quartile)`.
    pub fn show(&self, digits: usize) -> String {
        let [low, median, high] = [0.25, 0.5, 0.75].map(|share| self.quantile(share));
        format!("{median:.digits$} ({low:.digits$} to {high:.digits$})")
    }
}

/// Returns the ratio of each run to the other's run in the same round.
pub fn ratios(of: &[f64], to: &[f64]) -> Runs {
    of.iter().zip(to).map(|(of, to)| of / to).collect()
}
