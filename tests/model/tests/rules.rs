//! The properties hold, and each rule is needed: without it the model finds the failure that the rule prevents.

use ecdysis_model::scenarios::{self, Scenario};
use ecdysis_model::state::{Budget, Kind};
use ecdysis_model::{page, Carrier, Protocol, Rules};

#[test]
fn the_rules_hold() {
    for scenario in scenarios::small() {
        println!("{}", scenario.explore());
    }
}

#[test]
#[ignore = "some minutes to an hour"]
fn the_rules_hold_in_larger_bounds() {
    for scenario in scenarios::large() {
        println!("{}", scenario.explore());
    }
}

#[test]
fn the_page_says_what_the_model_says() {
    let (committed, current) = page::committed_and_current();
    assert_eq!(committed, current, "stale: run `cargo run -- page` in tests/model");
}

/// Checks that a property holds with all rules, and does not hold without that one.
fn is_needed(take_out: fn(&mut Rules), kind: Kind, budget: Budget, property: &'static str) -> bool {
    let scenario = |rules: Rules| {
        let mut model = Protocol::new(Carrier::Pipes, budget);
        model.rules = rules;
        model.kinds = vec![kind];
        model.manager = budget.reloads > 0;
        Scenario { name: property, model }
    };
    let mut rules = Rules::new(Carrier::Pipes);
    scenario(rules).explore();
    take_out(&mut rules);
    let path = scenario(rules).counterexample(property);
    println!("{property}: {path:?}");
    path.is_some()
}

const NONE: Budget = Budget {
    deaths: 0,
    freezes: 0,
    stops: 0,
    upgrades: 0,
    takeovers: 0,
    rollbacks: 0,
    refusals: 0,
    connections: 0,
    reloads: 0,
};

/// The upgrade fails, and the shell is killed. The child behind it mistakes the closed link for its parent's death.
#[test]
fn a_child_behind_a_shell_serves_beside_its_parent() {
    let budget = Budget { upgrades: 1, ..NONE };
    assert!(is_needed(|rules| rules.give_up_says_stop = false, Kind::Wrapped, budget, "one accepts"));
}

/// The service is stopped during the upgrade, but a process serves again later.
#[test]
fn a_stopped_service_comes_back() {
    let budget = Budget { upgrades: 1, stops: 1, ..NONE };
    assert!(is_needed(|rules| rules.give_up_says_stop = false, Kind::Wrapped, budget, "stopped stays stopped"));
}

/// A version on probation upgrades and dies. Then its parent and its child both serve.
#[test]
fn one_death_is_read_by_two() {
    let budget = Budget { upgrades: 2, deaths: 1, ..NONE };
    assert!(is_needed(|rules| rules.requests_wait = false, Kind::Child, budget, "one accepts"));
}

/// A reload arrives before the child knows that it was announced, so the child does not report the reload.
#[test]
fn a_reload_during_a_reload_does_not_end() {
    let budget = Budget { reloads: 2, ..NONE };
    assert!(is_needed(|rules| rules.requests_wait = false, Kind::Child, budget, "nothing waits forever"));
}

/// The child is dead, but its helper keeps the link open.
#[test]
fn a_death_is_not_seen() {
    let budget = Budget { upgrades: 1, deaths: 1, ..NONE };
    let take_out = |rules: &mut Rules| rules.process_end_is_seen = false;
    assert!(is_needed(take_out, Kind::WithHelper, budget, "the verdict is true"));
}

/// The parent pauses just after one of its threads was woken for a connection.
#[test]
fn a_wakeup_is_lost() {
    let budget = Budget { upgrades: 1, freezes: 1, connections: 1, ..NONE };
    assert!(is_needed(|rules| rules.woken_serves = false, Kind::Child, budget, "nothing waits forever"));
}

/// The parent ends before the child has sent `serving`, and the child dies.
#[test]
fn a_verdict_before_serving_is_false() {
    let budget = Budget { upgrades: 1, deaths: 1, ..NONE };
    assert!(is_needed(|rules| rules.waits_for_serving = false, Kind::Child, budget, "the verdict is true"));
}

/// The manifest fills the pipe.
#[test]
fn a_stop_is_lost() {
    let budget = Budget { upgrades: 1, stops: 1, ..NONE };
    assert!(is_needed(|rules| rules.stop_fits = false, Kind::LargeManifest, budget, "no stop is lost"));
}

/// A child is asked to roll back after its parent has died, or has just sent the verdict.
#[test]
fn a_rollback_leaves_nobody() {
    for deaths in [0, 1] {
        let budget = Budget { upgrades: 1, rollbacks: 1, deaths, ..NONE };
        assert!(is_needed(|rules| rules.rollback_waits = false, Kind::Child, budget, "a rollback has a taker"));
    }
}

/// A frozen child continues after its parent has given up on it, has stopped and has ended.
#[test]
fn a_stopped_service_comes_back_with_a_frozen_child() {
    let budget = Budget { upgrades: 1, stops: 1, deaths: 1, freezes: 1, ..NONE };
    assert!(is_needed(|rules| rules.stop_is_final = false, Kind::Wrapped, budget, "stopped stays stopped"));
}
