//! The same for many things at once, inside the freeze.

use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Things for which another thread pays: starting one takes some 50 µs.
const WORTH_A_THREAD: usize = 32;
/// Things that a thread takes at a time.
const BLOCK: usize = 16;
/// More threads than this would mostly wait for the kernel's locks, and for each other.
const MOST_THREADS: usize = 8;
/// N.B. asked once: the answer is looked for in files of /proc and of control groups.
static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS));

/// Does the same with all `items`, by as many threads as pay. The results are in the order of the items.
pub(crate) fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = PROCESSORS.min(items.len() / WORTH_A_THREAD);
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    // Whoever has the time takes the next block: a thread that has to share its processor does less.
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::new();
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            let Some(items) = items.chunks(BLOCK).nth(block) else { return done };
            done.push((block, items.iter().map(&work).collect::<Vec<R>>()));
        }
    };
    let in_a_hurry = godwit_kernel::sched::runs_first();
    let some_of_another = || {
        if in_a_hurry {
            // N.B. or all would wait for the one that does not run. Without the privilege all are alike.
            let _ = godwit_kernel::sched::run_first();
        }
        some()
    };
    let mut done = thread::scope(|scope| {
        // Where no thread is to be had, this one does it all.
        let others: Vec<_> =
            (1..threads).filter_map(|_| thread::Builder::new().spawn_scoped(scope, some_of_another).ok()).collect();
        let mut done = some();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(block, _)| *block);
    // N.B. they may be large: what grows with them is copied again and again.
    let mut all = Vec::with_capacity(items.len());
    done.into_iter().for_each(|(_, results)| all.extend(results));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_items() {
        for count in [0, 1, 63, 64, 1000, 1001] {
            let items: Vec<usize> = (0..count).collect();
            assert_eq!(map(&items, |item| item * 2), items.iter().map(|item| item * 2).collect::<Vec<_>>());
        }
    }
}
