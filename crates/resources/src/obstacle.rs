use std::fmt;

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
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.resource, self.text)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}
