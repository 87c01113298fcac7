//! Page sets against the simplest thing that could be right: a set of page numbers.

use std::collections::BTreeSet;

use godwit_pages::{PAGE_SIZE, PageRange, PageSet};
use proptest::prelude::*;

const SPAN: u64 = 96;

type Model = BTreeSet<u64>;

fn page_range() -> impl Strategy<Value = PageRange> {
    (0..SPAN, 1..24_u64).prop_map(|(start, pages)| PageRange::from_pages(start * PAGE_SIZE, pages).unwrap())
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(PageRange),
    Remove(PageRange),
    PopFront(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        page_range().prop_map(Step::Insert),
        page_range().prop_map(Step::Remove),
        (0..8_u64).prop_map(Step::PopFront),
    ]
}

fn numbers(range: PageRange) -> impl Iterator<Item = u64> {
    range.page_addresses().map(|address| address / PAGE_SIZE)
}

fn model_of(set: &PageSet) -> Model {
    set.iter().flat_map(numbers).collect()
}

fn assert_well_formed(set: &PageSet) {
    let ranges: Vec<_> = set.iter().collect();
    assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].start()), "overlapping or touching: {set:?}");
    assert_eq!(set.pages(), ranges.iter().map(|range| range.pages()).sum::<u64>());
    assert_eq!(set.range_count(), ranges.len());
    assert_eq!(set.is_empty(), ranges.is_empty());
    assert_eq!(set.first(), ranges.first().copied());
    assert_eq!(set.last(), ranges.last().copied());
}

fn apply(steps: &[Step]) -> (PageSet, Model) {
    let (mut set, mut model) = (PageSet::new(), Model::new());
    for step in steps {
        match *step {
            Step::Insert(range) => {
                set.insert(range);
                model.extend(numbers(range));
            }
            Step::Remove(range) => {
                set.remove(range);
                numbers(range).for_each(|page| {
                    model.remove(&page);
                });
            }
            Step::PopFront(most) => {
                let popped: Vec<_> = set.pop_front(most).into_iter().flat_map(numbers).collect();
                let mut wanted = Vec::new();
                while (wanted.len() as u64) < most
                    && model.first().is_some_and(|page| wanted.last().is_none_or(|last| page - last == 1))
                {
                    wanted.extend(model.pop_first());
                }
                assert_eq!(popped, wanted);
            }
        }
        assert_well_formed(&set);
        assert_eq!(model_of(&set), model);
    }
    (set, model)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn single_steps(steps in prop::collection::vec(step(), 0..40)) {
        apply(&steps);
    }

    #[test]
    fn algebra(left in prop::collection::vec(step(), 0..20), right in prop::collection::vec(step(), 0..20)) {
        let ((one, one_model), (two, two_model)) = (apply(&left), apply(&right));
        for (set, model) in [
            (one.union(&two), &one_model | &two_model),
            (one.intersection(&two), &one_model & &two_model),
            (one.subtract(&two), &one_model - &two_model),
        ] {
            assert_well_formed(&set);
            prop_assert_eq!(model_of(&set), model);
        }
        let mut removed = one.clone();
        removed.remove_all(&two);
        prop_assert_eq!(removed, one.subtract(&two));
        prop_assert_eq!(one.iter().rev().collect::<PageSet>(), one);
    }

    #[test]
    fn questions(steps in prop::collection::vec(step(), 0..20), range in page_range(), byte in 0..PAGE_SIZE) {
        let (set, model) = apply(&steps);
        let asked: Model = numbers(range).collect();
        prop_assert_eq!(model_of(&set.intersect_range(range)), &model & &asked);
        prop_assert_eq!(set.covers(range), asked.is_subset(&model));
        prop_assert_eq!(set.overlaps(range), !asked.is_disjoint(&model));
        prop_assert_eq!(set.contains(range.start() + byte), model.contains(&(range.start() / PAGE_SIZE)));
        let next = model.range(range.start() / PAGE_SIZE..).next().map(|page| page * PAGE_SIZE);
        prop_assert_eq!(set.first_from(range.start() + byte).map(PageRange::start), next);
    }
}
