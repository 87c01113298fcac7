//! How much memory there is for what others send: of this host, and of the control groups that this program, and all it makes, is in.

use std::fs;
use std::path::Path;

use godwit_resources::Obstacle;

/// Where hierarchies of control groups with a limit of memory are mounted, and what their files are called. cgroups(7)
const HIERARCHIES: [Hierarchy; 2] = [
    Hierarchy { controller: "", root: "/sys/fs/cgroup", limit: "memory.max", usage: "memory.current" },
    Hierarchy {
        controller: "memory",
        root: "/sys/fs/cgroup/memory",
        limit: "memory.limit_in_bytes",
        usage: "memory.usage_in_bytes",
    },
];

struct Hierarchy {
    /// As /proc/self/cgroup names it; nothing for version 2.
    controller: &'static str,
    root: &'static str,
    limit: &'static str,
    usage: &'static str,
}

/// Says what stands in the way of a process with so many bytes of memory, if there is not enough for it.
pub(crate) fn obstacle(bytes: u64) -> Option<Obstacle> {
    let (left, of) = left()?;
    let text = || format!("it has {} MiB, and {} MiB are left {of}", bytes >> 20, left >> 20);
    (bytes > left).then(|| Obstacle::new("memory", text(), "have more of it there"))
}

/// The least that is left, in bytes, and of what. `None` where the kernel says nothing.
fn left() -> Option<(u64, String)> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_host = fs::read_to_string("/proc/meminfo").ok().and_then(|text| of_host(&text));
    let of_host = of_host.map(|bytes| (bytes, "on this host".to_owned()));
    let of_groups =
        HIERARCHIES.iter().filter_map(|hierarchy| of_groups(hierarchy, path_of(&groups, hierarchy.controller)?));
    of_groups.chain(of_host).min()
}

/// What programs can have without others going short (proc_meminfo(5)).
fn of_host(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Some((field("MemAvailable")? + field("SwapFree").unwrap_or(0)) << 10)
}

/// The path of this program's group in a hierarchy. A line of the file: `number:controller,controller:path`.
fn path_of<'a>(groups: &'a str, controller: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(path)
    })
}

/// The least that is left of a group and those around it.
fn of_groups(hierarchy: &Hierarchy, path: &str) -> Option<(u64, String)> {
    let root = Path::new(hierarchy.root);
    let group = root.join(path.trim_start_matches('/'));
    let around = group.ancestors().take_while(|group| group.starts_with(root));
    let left = around.filter_map(|group| {
        let number = |file: &str| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        let limit = number(hierarchy.limit)?;
        let cached = fs::read_to_string(group.join("memory.stat")).map_or(0, |text| cached(&text));
        let left = (limit + cached).saturating_sub(number(hierarchy.usage)?);
        Some((left, format!("in the control group {} of the page server", group.display())))
    });
    left.min()
}

/// Bytes of files that the kernel gives up when memory is wanted.
fn cached(stat: &str) -> u64 {
    let of_files = |line: &&str| line.starts_with("inactive_file ") || line.starts_with("active_file ");
    let number = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    stat.lines().filter(of_files).filter_map(number).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_read() {
        assert_eq!(of_host("MemTotal:  9 kB\nMemAvailable:   7 kB\nSwapFree: 2 kB\n"), Some(9 << 10));
        assert_eq!(of_host("MemTotal:  9 kB\n"), None);
        let groups = "4:cpu,memory:/a/b\n2:cpu:/x\n0::/c\n";
        assert_eq!((path_of(groups, "memory"), path_of(groups, "")), (Some("/a/b"), Some("/c")));
        assert_eq!(path_of("", "memory"), None);
        assert_eq!(cached("anon 5\nfile 9\ninactive_file 3\nactive_file 4\n"), 7);
    }

    #[test]
    fn groups_count_with_those_around_them() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |path: &Path, limit: &str, usage: &str| {
            fs::write(path.join("memory.max"), limit).unwrap();
            fs::write(path.join("memory.current"), usage).unwrap();
        };
        write(&inner, "max\n", "900\n");
        write(&root.path().join("outer"), "1000\n", "950\n");
        let hierarchy = Hierarchy { root: root.path().to_str().unwrap().to_owned().leak(), ..HIERARCHIES[0] };
        let (left, of) = of_groups(&hierarchy, "/outer/inner").unwrap();
        assert!(left == 50 && of.contains("outer of"), "{left} {of}");
        assert!(of_groups(&hierarchy, "/elsewhere").is_none());
    }

    #[test]
    fn only_what_is_too_much_is_refused() {
        assert_eq!(obstacle(1 << 20), None);
        let refused = obstacle(u64::MAX >> 1).expect("no host has that much");
        assert!(refused.to_string().contains("MiB are left"), "{refused}");
    }
}
