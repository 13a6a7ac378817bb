//! The programs whose verdicts are checked, from Debian's packages: for each a command of the kind that it is there for,
//! and what must come of it. Programs are not left out for the answer that they give.

/// How a command is known to have done its work.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Check {
    /// It ends with this code, and its output has this text.
    Ends(i32, &'static str),
    /// It listens on this port, and answers these bytes with something that has this text.
    Answers(u16, &'static str, &'static str),
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) argv: &'static [&'static str],
    pub(crate) check: Check,
}

const fn case(argv: &'static [&'static str], check: Check) -> Case {
    Case { argv, check }
}

/// What is installed beside Debian's essential packages.
pub(crate) const PACKAGES: &[&str] = &[
    "bc",
    "brotli",
    "busybox-static",
    "bzip2",
    "ca-certificates",
    "caddy",
    "cmark",
    "curl",
    "dc",
    "fd-find",
    "figlet",
    "file",
    "gawk",
    "git",
    "haproxy",
    "hugo",
    "jq",
    "libxml2-utils",
    "lighttpd",
    "lua5.4",
    "lz4",
    "m4",
    "make",
    "memcached",
    "minisign",
    "mosquitto",
    "netbase",
    "nginx-light",
    "openssl",
    "prometheus-node-exporter",
    "python3-minimal",
    "qrencode",
    "redis-server",
    "ripgrep",
    "rsync",
    "socat",
    "sqlite3",
    "tcl8.6",
    "units",
    "wget",
    "xmlstarlet",
    "xz-utils",
    "zstd",
];

/// Files that the commands work on, with their contents.
pub(crate) const FILES: &[(&str, &str)] = &[
    ("/srv/calc.bc", "6*7\\nquit\\n"),
    ("/srv/doc.md", "# Title\\n\\nSome *text*.\\n"),
    ("/srv/doc.xml", "<a><b>42</b></a>\\n"),
    ("/srv/macro.m4", "define(`answer\\047, `42\\047)answer\\n"),
    ("/srv/script.tcl", "puts [expr {6*7}]; exit 3\\n"),
    ("/srv/www/index.html", "<p>served</p>\\n"),
    (
        "/srv/make/Makefile",
        "out: in\\n\\tcat in > out; cat out\\n",
    ),
    ("/srv/make/in", "made 42\\n"),
    ("/srv/site/config.toml", "title = \"T\"\\n"),
    (
        "/srv/site/content/page.md",
        "---\\ntitle: P\\n---\\nHello\\n",
    ),
    (
        "/srv/site/layouts/_default/single.html",
        "{{ .Content }}\\n",
    ),
    (
        "/srv/lighttpd.conf",
        "server.document-root = \"/srv/www\"\\nserver.port = 80\\nindex-file.names = (\"index.html\")\\n",
    ),
    (
        "/srv/haproxy.cfg",
        "defaults\\n mode http\\n timeout client 5s\\n timeout server 5s\\n timeout connect 5s\\nfrontend f\\n bind :80\\n http-request return status 200 content-type text/plain string served\\n",
    ),
    (
        "/srv/mosquitto.conf",
        "listener 1883\\nallow_anonymous true\\nuser root\\n",
    ),
    (
        "/srv/nginx.conf",
        "error_log stderr;\\nevents {}\\nhttp { access_log off; server { listen 80; root /srv/www; } }\\n",
    ),
];

/// Stands for the address at which the host serves a line while the programs run.
pub(crate) const HOST: &str = "http://HOST/";

const GET: &str = "GET / HTTP/1.0\r\nHost: x\r\n\r\n";

/// The programs.
pub(crate) const CASES: &[Case] = &[
    case(
        &[
            "sqlite3",
            "/tmp/x.db",
            "create table t(a); insert into t values(20),(22); select sum(a) from t;",
        ],
        Check::Ends(0, "42"),
    ),
    case(
        &["lua5.4", "-e", "print(6*7) os.exit(3)"],
        Check::Ends(3, "42"),
    ),
    case(
        &["redis-server", "--save", "", "--protected-mode", "no"],
        Check::Answers(6379, "SET k 42\r\nGET k\r\nQUIT\r\n", "$2\r\n42"),
    ),
    case(
        &[
            "nginx",
            "-c",
            "/srv/nginx.conf",
            "-g",
            "daemon off; master_process off;",
        ],
        Check::Answers(80, GET, "served"),
    ),
    case(
        &["hugo", "-s", "/srv/site", "-d", "/tmp/out"],
        Check::Ends(0, "Total in"),
    ),
    case(
        &["memcached", "-u", "root"],
        Check::Answers(
            11211,
            "set k 0 0 2\r\n42\r\nget k\r\nquit\r\n",
            "VALUE k 0 2\r\n42",
        ),
    ),
    case(
        &["lighttpd", "-D", "-f", "/srv/lighttpd.conf"],
        Check::Answers(80, GET, "served"),
    ),
    case(
        &["haproxy", "-db", "-f", "/srv/haproxy.cfg"],
        Check::Answers(80, GET, "served"),
    ),
    // CONNECT as MQTT 3.1.1, answered by CONNACK.
    case(
        &["mosquitto", "-c", "/srv/mosquitto.conf"],
        Check::Answers(
            1883,
            "\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01x",
            "\x20\x02\x00\x00",
        ),
    ),
    case(
        &[
            "caddy",
            "file-server",
            "--root",
            "/srv/www",
            "--listen",
            ":80",
        ],
        Check::Answers(80, GET, "served"),
    ),
    case(
        &["prometheus-node-exporter"],
        Check::Answers(
            9100,
            "GET /metrics HTTP/1.0\r\n\r\n",
            "node_exporter_build_info",
        ),
    ),
    case(
        &["busybox", "httpd", "-f", "-h", "/srv/www"],
        Check::Answers(80, GET, "served"),
    ),
    case(
        &[
            "socat",
            "TCP-LISTEN:80,fork,reuseaddr",
            "SYSTEM:echo served",
        ],
        Check::Answers(80, "x", "served"),
    ),
    case(&["jq", "-n", "[1,2,3]|add*7"], Check::Ends(0, "42")),
    case(&["xz", "-kc", "/srv/doc.md"], Check::Ends(0, "7zXZ")),
    case(
        &["brotli", "-q", "0", "-c", "/srv/make/in"],
        // At this quality small contents are stored as they are.
        Check::Ends(0, "made 42"),
    ),
    case(
        &["zstd", "-qc", "/srv/www/index.html"],
        Check::Ends(0, "<p>served"),
    ),
    case(&["bzip2", "-kc", "/srv/doc.md"], Check::Ends(0, "BZh")),
    case(&["gzip", "-kc", "/srv/doc.md"], Check::Ends(0, "doc.md")),
    case(
        &["lz4", "-qc", "/srv/www/index.html"],
        Check::Ends(0, "<p>served"),
    ),
    case(
        &["qrencode", "-t", "ASCII", "vistara"],
        Check::Ends(0, "##############"),
    ),
    case(&["figlet", "-f", "term", "Hi"], Check::Ends(0, "Hi")),
    case(&["bc", "/srv/calc.bc"], Check::Ends(0, "42")),
    case(&["dc", "-e", "6 7 * p"], Check::Ends(0, "42")),
    case(&["units", "-t", "1 inch", "cm"], Check::Ends(0, "2.54")),
    case(&["cmark", "/srv/doc.md"], Check::Ends(0, "<h1>Title</h1>")),
    case(
        &["xmllint", "--xpath", "//b/text()", "/srv/doc.xml"],
        Check::Ends(0, "42"),
    ),
    case(
        &["xmlstarlet", "sel", "-t", "-v", "//b", "/srv/doc.xml"],
        Check::Ends(0, "42"),
    ),
    case(
        &["minisign", "-G", "-W", "-p", "/tmp/p", "-s", "/tmp/s"],
        Check::Ends(0, "minisign -Vm"),
    ),
    case(&["m4", "/srv/macro.m4"], Check::Ends(0, "42")),
    case(&["curl", "-s", HOST], Check::Ends(0, "served by the host")),
    case(
        &["wget", "-q", "-O", "-", HOST],
        Check::Ends(0, "served by the host"),
    ),
    case(&["file", "/usr/bin/dc"], Check::Ends(0, "ELF 64-bit")),
    case(
        &["openssl", "dgst", "-sha256", "/srv/make/in"],
        Check::Ends(0, "SHA2-256(/srv/make/in)= "),
    ),
    case(
        &[
            "python3",
            "-c",
            "import os; print(6*7); raise SystemExit(3)",
        ],
        Check::Ends(3, "42"),
    ),
    case(
        &["perl", "-e", "print `echo 42`; exit 4"],
        Check::Ends(4, "42"),
    ),
    case(&["tclsh8.6", "/srv/script.tcl"], Check::Ends(3, "42")),
    case(
        &["gawk", "BEGIN { print 6*7; exit 5 }"],
        Check::Ends(5, "42"),
    ),
    case(
        &["mawk", "BEGIN { print 6*7; exit 5 }"],
        Check::Ends(5, "42"),
    ),
    case(
        &["sed", "-n", "s/made //p", "/srv/make/in"],
        Check::Ends(0, "42"),
    ),
    case(&["grep", "-c", "root", "/etc/passwd"], Check::Ends(0, "1")),
    case(&["rg", "made", "/srv/make/in"], Check::Ends(0, "made 42")),
    case(
        &["fdfind", "Makefile", "/srv"],
        Check::Ends(0, "/srv/make/Makefile"),
    ),
    case(
        &[
            "find",
            "/srv/make",
            "-name",
            "in",
            "-exec",
            "cat",
            "{}",
            ";",
        ],
        Check::Ends(0, "made 42"),
    ),
    case(&["sort", "-r", "/etc/passwd"], Check::Ends(0, "root:x:0:0")),
    case(
        &["sha256sum", "/srv/make/in"],
        Check::Ends(0, "  /srv/make/in"),
    ),
    case(&["date", "-u", "-d", "@0", "+%Y"], Check::Ends(0, "1970")),
    case(&["ls", "/srv/make"], Check::Ends(0, "Makefile\nin")),
    case(
        &["tar", "-czf", "/tmp/x.tgz", "/srv/make"],
        Check::Ends(0, ""),
    ),
    case(
        &["diff", "/srv/make/in", "/srv/calc.bc"],
        Check::Ends(1, "made 42"),
    ),
    case(&["make", "-C", "/srv/make"], Check::Ends(0, "made 42")),
    case(
        &[
            "git",
            "clone",
            "-q",
            "--no-hardlinks",
            "/srv/repo",
            "/tmp/clone",
        ],
        Check::Ends(0, ""),
    ),
    case(
        &["rsync", "-r", "/srv/make/", "/tmp/e/"],
        Check::Ends(0, ""),
    ),
    case(&["bash", "-c", "ls /srv/make | wc -l"], Check::Ends(0, "2")),
    case(&["dash", "-c", "ls /srv/make | wc -l"], Check::Ends(0, "2")),
    case(
        &["busybox", "wc", "-c", "/srv/make/in"],
        Check::Ends(0, "8 /srv/make/in"),
    ),
];
