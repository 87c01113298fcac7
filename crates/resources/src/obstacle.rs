use std::fmt;

/// The last way out for connections, alone or behind others and `, or `.
pub const LEAVE_BEHIND: &str = "give --tcp-close to leave connections behind";

/// Something that keeps a process from being moved, found before it is touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Which resource, named so that its owner recognises it: `fd 5 (TCP connection 10.0.0.1:80 - 10.0.0.2:4711)`.
    pub resource: String,
    /// Why it cannot be moved.
    pub text: String,
    /// The way out, empty when there is none.
    pub remedy: String,
}

impl Obstacle {
    /// Describes an obstacle.
    pub fn new(resource: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { resource: resource.into(), text: text.into(), remedy: remedy.into() }
    }

    /// The same where connections move alone, by a command that cannot leave them behind: who names them can leave them out.
    #[must_use]
    pub fn of_a_connection_alone(mut self) -> Self {
        self.remedy = match self.remedy.strip_suffix(LEAVE_BEHIND) {
            Some("") => "leave it out".to_owned(),
            Some(others) => others.trim_end_matches(", or ").to_owned(),
            None => self.remedy,
        };
        self
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.resource, self.text)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_alone_are_not_left_behind() {
        let remedy = |remedy: &str| Obstacle::new("connection", "it is tied", remedy).of_a_connection_alone().remedy;
        assert_eq!(remedy(LEAVE_BEHIND), "leave it out");
        assert_eq!(remedy(&format!("give --move-addr, or {LEAVE_BEHIND}")), "give --move-addr");
        assert_eq!(remedy("try again"), "try again");
    }
}
