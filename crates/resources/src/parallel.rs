//! The same for many things at once, inside the freeze.

use std::num::NonZero;
use std::thread;

/// Things for which another thread pays: starting one takes some 50 µs.
const WORTH_A_THREAD: usize = 32;
/// More threads than this would mostly wait for the kernel's locks, and for each other.
const MOST_THREADS: usize = 8;

/// Does the same with all `items`, by as many threads as pay. The results are in the order of the items.
pub(crate) fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let processors = thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    let threads = processors.min(items.len() / WORTH_A_THREAD);
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    let mut parts = items.chunks(items.len().div_ceil(threads));
    let own = parts.next().unwrap_or_default();
    thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = parts
            .map(|part| {
                let all = move || part.iter().map(work).collect::<Vec<R>>();
                // Where no thread is to be had, this one does it all.
                thread::Builder::new().spawn_scoped(scope, all).map_err(|_| part)
            })
            .collect();
        let mut results: Vec<R> = own.iter().map(work).collect();
        for other in others {
            match other.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(done)) => results.extend(done),
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(part) => results.extend(part.iter().map(work)),
            }
        }
        results
    })
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
