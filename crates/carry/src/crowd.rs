//! Callers who have proven nothing yet: each costs a handshake and some memory, so there is a limit to them, and a lower one to
//! those from one address, so that nobody keeps others out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Callers at once, from everywhere.
const MOST: usize = 256;
/// Callers at once from one address.
const MOST_FROM_ONE: usize = 32;

/// How many there are, by address.
#[derive(Debug, Default)]
pub(crate) struct Crowd(Mutex<HashMap<IpAddr, usize>>);

/// One of them. Dropped, it makes room.
#[derive(Debug)]
pub(crate) struct Place {
    crowd: Arc<Crowd>,
    ip: IpAddr,
}

impl Crowd {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one more in; `None` where there is no room.
    pub(crate) fn admit(self: &Arc<Self>, ip: IpAddr) -> Option<Place> {
        let mut present = self.lock();
        let all: usize = present.values().sum();
        let own = present.get(&ip).copied().unwrap_or(0);
        if all >= MOST || own >= MOST_FROM_ONE {
            return None;
        }
        present.insert(ip, own + 1);
        Some(Place { crowd: self.clone(), ip })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut present = self.crowd.lock();
        match present.get_mut(&self.ip) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(present.remove(&self.ip)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_keep_others_out() {
        let crowd = Arc::<Crowd>::default();
        let flooder = IpAddr::from([192, 0, 2, 1]);
        let mut places: Vec<Place> = std::iter::from_fn(|| crowd.admit(flooder)).collect();
        assert_eq!(places.len(), MOST_FROM_ONE);
        let other = crowd.admit(IpAddr::from([192, 0, 2, 2]));
        assert!(other.is_some());
        places.pop();
        assert!(crowd.admit(flooder).is_some());
        drop((places, other));
        assert!(crowd.lock().is_empty());
        let everybody: Vec<_> = (0..=255).filter_map(|last| crowd.admit([198, 51, 100, last].into())).collect();
        assert_eq!(everybody.len(), MOST);
        assert!(crowd.admit(flooder).is_none());
    }
}
