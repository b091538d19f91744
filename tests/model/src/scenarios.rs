//! The explorations, each complete within its bounds.

use std::fmt;

use stateright::{Checker, HasDiscoveries, Model};

use crate::state::{Budget, Kind};
use crate::{Action, Carrier, Protocol};

/// A bounded exploration.
pub struct Scenario {
    pub name: &'static str,
    pub model: Protocol,
}

/// The result of an exploration that is complete and found no counterexample.
pub struct Explored {
    pub name: &'static str,
    pub carrier: Carrier,
    pub states: usize,
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?}): {} states", self.name, self.carrier, self.states)
    }
}

impl Scenario {
    /// Panics with the shortest counterexample if a property does not hold.
    pub fn explore(self) -> Explored {
        let (name, carrier) = (self.name, self.model.rules.carrier);
        let checker = self.model.checker().threads(2).spawn_bfs().join();
        checker.assert_properties();
        assert!(checker.is_done(), "{name}: not everything was explored");
        Explored { name, carrier, states: checker.unique_state_count() }
    }

    /// Returns the shortest path to a state in which this property does not hold.
    pub fn counterexample(self, property: &'static str) -> Option<Vec<Action>> {
        let until = HasDiscoveries::AllOf([property].into());
        let checker = self.model.checker().finish_when(until).spawn_bfs().join();
        checker.discovery(property).map(|path| path.into_actions())
    }
}

const EVERY_KIND: [Kind; 4] = [Kind::Child, Kind::LargeManifest, Kind::Wrapped, Kind::WithHelper];

fn both(name: &'static str, budget: Budget, change: impl Fn(&mut Protocol)) -> impl Iterator<Item = Scenario> {
    [Carrier::Pipes, Carrier::Socket]
        .map(|carrier| {
            let mut model = Protocol::new(carrier, budget);
            change(&mut model);
            Scenario { name, model }
        })
        .into_iter()
}

/// Explorations that take about a minute.
pub fn small() -> Vec<Scenario> {
    let none = Budget::default();
    let one = Budget { upgrades: 1, deaths: 1, freezes: 1, ..none };
    let mut all = Vec::new();
    all.extend(both("every kind of child, a death, a freeze, a stop", Budget { stops: 1, ..one }, |model| {
        model.kinds = EVERY_KIND.into()
    }));
    all.extend(both(
        "a refusal or a rollback, a death, a freeze, a stop",
        Budget { refusals: 1, rollbacks: 1, stops: 1, ..one },
        |_| {},
    ));
    all.extend(both("two upgrades, also one in the other, a death, a freeze", Budget { upgrades: 2, ..one }, |_| {}));
    all.extend(both("two upgrades of every kind, a death", Budget { upgrades: 2, deaths: 1, ..none }, |model| {
        model.kinds = EVERY_KIND.into()
    }));
    all.extend(both(
        "a takeover, a death, a freeze, a stop",
        Budget { upgrades: 0, takeovers: 1, stops: 1, ..one },
        |_| {},
    ));
    all.extend(both("a takeover and an upgrade, a death", Budget { takeovers: 1, freezes: 0, ..one }, |_| {}));
    all.extend(both("two connections, a death, a freeze", Budget { connections: 2, ..one }, |_| {}));
    all.extend(both(
        "a service manager that asks for two reloads, a death, a freeze",
        Budget { upgrades: 0, reloads: 2, ..one },
        |model| model.manager = true,
    ));
    all
}

/// Explorations that take about an hour.
pub fn large() -> Vec<Scenario> {
    let one = Budget { upgrades: 2, deaths: 1, freezes: 1, ..Budget::default() };
    let mut all = Vec::new();
    all.extend(both("two upgrades, a death, a freeze, a stop", Budget { stops: 1, ..one }, |_| {}));
    all.extend(both("two upgrades, two deaths, a freeze", Budget { deaths: 2, ..one }, |_| {}));
    all.extend(both("two upgrades, a death, two freezes", Budget { freezes: 2, ..one }, |_| {}));
    all.extend(both("two upgrades, a rollback, a death, a freeze", Budget { rollbacks: 1, ..one }, |_| {}));
    all.extend(both("two upgrades of every kind, a death, a freeze", one, |model| model.kinds = EVERY_KIND.into()));
    all.extend(both(
        "a takeover and an upgrade, a death, a freeze, a stop",
        Budget { upgrades: 1, takeovers: 1, stops: 1, ..one },
        |_| {},
    ));
    all.extend(both("four processes, three upgrades, a death", Budget { upgrades: 3, freezes: 0, ..one }, |model| {
        model.processes = 4;
    }));
    all.extend(both(
        "a service manager, a reload, an upgrade, a stop, a death, a freeze",
        Budget { upgrades: 1, reloads: 1, stops: 1, ..one },
        |model| model.manager = true,
    ));
    all
}
