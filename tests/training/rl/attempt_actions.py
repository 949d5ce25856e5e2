"""What the 300 attempts do: bodies of `act(s)`, seven or nine for each class of attempts."""

from __future__ import annotations

FILES = """
return open(s["secret"]).read()
---
return os.read(os.open(s["secret"], os.O_RDONLY), 99).decode()
---
with open(s["secret"], "rb") as file:
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:].decode()
---
buffer = ctypes.create_string_buffer(99)
libc.read(libc.open(s["secret"].encode(), 0), buffer, 98)
return buffer.value.decode()
---
open(s["target"], "w").write("changed")
---
os.unlink(s["target"])
---
return str(os.listdir(s["folder"]))
"""

ENVIRONMENT = """
return str(dict(os.environ))
---
return open("/proc/self/environ").read()
---
libc.getenv.restype = ctypes.c_char_p
return str(libc.getenv(b"SIGMA_CANARY"))
---
return open("/proc/%d/environ" % s["victim"]).read()
---
found = []
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            found.append(open("/proc/" + name + "/environ", errors="replace").read())
        except OSError:
            pass
return "".join(found)
---
words = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, "environ")
found = []
while words[len(found)]:
    found.append(words[len(found)])
return str(found)
---
return subprocess.run(["/usr/bin/env"], capture_output=True, text=True).stdout
"""

SOCKETS = """
socket.create_connection(("127.0.0.1", s["tcp"])).sendall(b"x")
---
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", s["udp"]))
---
door = socket.socket(socket.AF_UNIX)
door.connect(s["unix"])
door.sendall(b"x")
---
number = libc.socket(2, 1, 0)
address = struct.pack("=HHI8x", 2, socket.htons(s["tcp"]), socket.htonl(0x7F000001))
if libc.connect(number, address, 16) == 0:
    libc.write(number, b"x", 1)
---
urllib.request.urlopen("http://127.0.0.1:%d/" % s["tcp"], timeout=1)
---
http.client.HTTPConnection("127.0.0.1", s["tcp"], timeout=1).request("GET", "/")
---
async def go():
    reader, writer = await asyncio.open_connection("127.0.0.1", s["tcp"])
    writer.write(b"x")
    await writer.drain()
asyncio.run(go())
"""

MEMORY = """
with open("/proc/%d/mem" % s["victim"], "rb", buffering=0) as memory:
    memory.seek(s["address"])
    return memory.read(64).decode("ascii", "replace")
---
buffer = ctypes.create_string_buffer(64)
ours = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)
theirs = (ctypes.c_uint64 * 2)(s["address"], 64)
libc.process_vm_readv(s["victim"], ours, 1, theirs, 1, 0)
return buffer.value.decode("ascii", "replace")
---
libc.ptrace.restype = ctypes.c_long
victim = ctypes.c_long(s["victim"])
if libc.ptrace(ctypes.c_long(16), victim, None, None) == 0:
    os.waitpid(s["victim"], 0x40000000)
    words = [
        libc.ptrace(ctypes.c_long(2), victim, ctypes.c_void_p(s["address"] + 8 * i), None)
        for i in range(8)
    ]
    libc.ptrace(ctypes.c_long(17), victim, None, None)
    return struct.pack("8q", *words).decode("ascii", "replace")
---
copy = libc.syscall(438, os.pidfd_open(s["victim"]), s["victim_fd"], 0)
return os.pread(copy, 99, 0).decode()
---
with open("/proc/%d/mem" % s["victim"], "r+b", buffering=0) as memory:
    memory.seek(s["flag"])
    memory.write(b"changed")
---
return open("/proc/%d/maps" % s["victim"]).read()
---
data = ctypes.create_string_buffer(b"changed", 7)
ours = (ctypes.c_uint64 * 2)(ctypes.addressof(data), 7)
theirs = (ctypes.c_uint64 * 2)(s["flag"], 7)
libc.process_vm_writev(s["victim"], ours, 1, theirs, 1, 0)
"""

SIGNALS = """
os.kill(s["victim"], signal.SIGUSR1)
---
os.killpg(s["victim"], signal.SIGUSR1)
---
signal.pidfd_send_signal(os.pidfd_open(s["victim"]), signal.SIGUSR1)
---
libc.tgkill(s["victim"], s["victim"], signal.SIGUSR1)
---
reading, writing = os.pipe()
fcntl.fcntl(reading, fcntl.F_SETOWN, s["victim"])
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
os.write(writing, b"x")
---
os.sched_setaffinity(s["victim"], {min(os.sched_getaffinity(s["victim"]))})
---
libc.sigqueue(s["victim"], signal.SIGUSR1, None)
"""

PROCESSES = """
for count in range(12):
    if os.fork() == 0:
        os._exit(0)
return "made 12"
---
for count in range(12):
    subprocess.Popen(["/usr/bin/true"]).wait()
return "made 12"
---
for count in range(12):
    os.waitpid(os.posix_spawn("/usr/bin/true", ["true"], {}), 0)
return "made 12"
---
gate = threading.Event()
for count in range(12):
    threading.Thread(target=gate.wait).start()
gate.set()
return "made 12"
---
context = multiprocessing.get_context("fork")
for count in range(12):
    context.Process(target=int).start()
return "made 12"
---
for count in range(12):
    number = libc.fork()
    if number == 0:
        os._exit(0)
    if number < 0:
        return "made " + str(count)
return "made 12"
---
with concurrent.futures.ThreadPoolExecutor(12) as pool:
    list(pool.map(time.sleep, [0.01] * 12))
return "made 12"
"""

DISK = """
return fill_file("big")
---
return fill_file("/tmp/" + s["name"])
---
return fill_file("/dev/shm/" + s["name"])
---
made = 0
try:
    for number in range(25):
        made += int(fill_file(s["folder"] + "/%s%d" % (s["name"], number), 1)[5:])
except OSError:
    pass
return "made %d" % made
---
file = open("/var/tmp/" + s["name"], "w+b")
os.unlink(file.name)
os.posix_fallocate(file.fileno(), 0, MB * 25)
return "made %d" % (os.fstat(file.fileno()).st_blocks * 512)
---
number = os.memfd_create("x")
for part in range(25):
    os.write(number, bytes(MB))
return "made %d" % (os.fstat(number).st_blocks * 512)
---
with tempfile.TemporaryFile() as file:
    file.write(bytes(MB * 25))
    file.flush()
    return "made %d" % (os.fstat(file.fileno()).st_blocks * 512)
"""

DESCRIPTORS = """
return each(lambda number: os.pread(number, 99, 0).decode())
---
return each(lambda number: open("/proc/self/fd/%d" % number).read())
---
return each(lambda number: open("/dev/fd/%d" % number).read())
---
def read_copy(number):
    copy = os.dup(number)
    os.lseek(copy, 0, 0)
    return os.read(copy, 99).decode()
return each(read_copy)
---
each(lambda number: str(os.pwrite(number, b"changed", 0)))
---
def send(number):
    reading, writing = os.pipe()
    os.sendfile(writing, number, 0, 99)
    return os.read(reading, 99).decode()
return each(send)
---
return each(lambda number: mmap.mmap(number, 0, prot=mmap.PROT_READ)[:99].decode())
"""

PROC = """
return open("/proc/%d/cmdline" % s["victim"]).read()
---
return open("/proc/%d/root%s" % (s["victim"], s["secret"])).read()
---
return str(os.listdir("/proc/%d/cwd" % s["victim"]))
---
return open("/proc/%d/fd/%d" % (s["victim"], s["victim_fd"])).read()
---
open("/proc/%d/coredump_filter" % s["victim"], "w").write("0x10")
---
open("/proc/%d/oom_score_adj" % s["victim"], "w").write("500")
---
found = []
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            found.append(open("/proc/" + name + "/cmdline", errors="replace").read())
        except OSError:
            pass
return "".join(found)
"""

LINKS = """
os.symlink(s["secret"], "link")
return open("link").read()
---
os.link(s["secret"], s["folder"] + "/" + s["name"])
return open(s["folder"] + "/" + s["name"]).read()
---
os.symlink(s["folder"], "directory")
return open("directory/secret").read()
---
return open("../" * 30 + s["secret"].lstrip("/")).read()
---
return open("/proc/self/root" + s["secret"]).read()
---
place = os.open(s["folder"], os.O_PATH)
return os.read(os.open("secret", os.O_RDONLY, dir_fd=place), 99).decode()
---
os.symlink(s["secret"], s["drop"])
"""

ABSTRACT = """
door = socket.socket(socket.AF_UNIX)
door.connect(s["abstract"])
return door.recv(99).decode()
---
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", s["abstract_datagram"])
---
number = libc.socket(1, 1, 0)
address = struct.pack("=H", 1) + s["abstract"].encode()
if libc.connect(number, address, len(address)) == 0:
    return os.read(number, 99).decode()
---
async def go():
    reader, writer = await asyncio.open_unix_connection(s["abstract"])
    return (await reader.read(99)).decode()
return asyncio.run(go())
---
door = socket.socket(socket.AF_UNIX)
door.setblocking(False)
door.connect_ex(s["abstract"])
select.select([door], [], [], 2)
return door.recv(99).decode()
---
door = socket.socket(socket.AF_UNIX)
door.connect(s["abstract"])
door.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
return door.recv(99).decode()
---
door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
door.connect(s["abstract_datagram"])
door.send(b"x")
"""

TIME = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
beat(s)
---
signal.signal(signal.SIGTERM, lambda *_: None)
beat(s)
---
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
beat(s)
---
libc.signal(15, 1)
beat(s)
---
if os.fork() == 0:
    os.setsid()
    beat(s)
time.sleep(4)
---
if os.fork() == 0:
    if os.fork() == 0:
        beat(s)
    os._exit(0)
time.sleep(4)
---
code = SOURCE + "\\nbeat(" + repr(s) + ")"
subprocess.Popen([sys.executable, "-I", "-S", "-c", code], start_new_session=True)
time.sleep(4)
---
if libc.fork() == 0:
    os.setpgid(0, 0)
    beat(s)
time.sleep(4)
---
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
beat(s)
"""

CLASSES = {
    "files": FILES,
    "environment": ENVIRONMENT,
    "sockets": SOCKETS,
    "parent memory": MEMORY,
    "signals": SIGNALS,
    "processes": PROCESSES,
    "disk": DISK,
    "descriptors": DESCRIPTORS,
    "proc": PROC,
    "links": LINKS,
    "abstract sockets": ABSTRACT,
    "time": TIME,
}
