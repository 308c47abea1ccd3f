package main

// Which file a command runs, with which environment, and why it cannot be run.

import (
	"cmp"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
)

// envMap returns an environment by name. The last of a name counts.
func envMap(env []string) map[string]string {
	vars := make(map[string]string, len(env))
	for _, entry := range env {
		name, value, _ := strings.Cut(entry, "=")
		vars[name] = value
	}
	return vars
}

// findProgram returns the file that a process in the folder dir runs as name, where its PATH is
// path (execvp(3)). A name with a slash stays as it is.
func findProgram(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, folder := range filepath.SplitList(path) {
		if !filepath.IsAbs(folder) {
			folder = filepath.Join(dir, folder)
		}
		if file, err := exec.LookPath(filepath.Join(folder, name)); err == nil {
			return file, nil
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

// startError is why a process could not be started, in words, and the error of the system call.
type startError struct {
	text string
	err  error
}

func (e *startError) Error() string { return e.text }
func (e *startError) Unwrap() error { return e.err }

// describeStart returns err, of starting cmd, in the words of the pipeline file.
func describeStart(cmd *exec.Cmd, err error) error {
	dir, dirErr := os.Stat(cmp.Or(cmd.Dir, "."))
	if dirErr == nil && !dir.IsDir() {
		dirErr = syscall.ENOTDIR
	} else if dirErr == nil {
		dirErr = syscall.Access(cmp.Or(cmd.Dir, "."), 1) // X_OK
	}
	if dirErr != nil {
		return fmt.Errorf("cannot enter its working_dir %q: %w", cmd.Dir, cause(dirErr))
	}
	if fault := sizeFault(cmd.Args, cmd.Env); errors.Is(err, syscall.E2BIG) && fault != "" {
		return &startError{fmt.Sprintf("cannot run %q: %s", cmd.Args[0], fault), err}
	}
	return describeProgram(cmd.Args[0], cmd.Path, cmd.Dir, err)
}

// describeProgram returns err, of running file in the folder dir, with what to do about it. The
// pipeline file calls it program; file is "" where it was not found.
func describeProgram(program, file, dir string, err error) error {
	info, fileErr := os.Stat(file)
	why, kind := cause(err).Error(), err
	switch err := cause(err); {
	case errors.Is(err, exec.ErrNotFound):
		why = "it is not found in PATH"
		if _, err := os.Stat(filepath.Join(dir, program)); err == nil {
			why += fmt.Sprintf("; the file in its folder is %q", "./"+program)
		} else if strings.ContainsAny(program, " \t") {
			why += fmt.Sprintf("; no shell reads it, so a command line is a list: [%s]", listOf(program, true))
		}
	case errors.Is(err, fs.ErrNotExist) && fileErr == nil:
		why = cmp.Or(programFault(file), "the interpreter that it names, or its loader, does not exist")
	case errors.Is(err, fs.ErrNotExist):
		if near, err := filepath.Rel(dir, file); err == nil && filepath.IsLocal(near) {
			if right := pathFrom(dir, near); right != "" {
				why += fmt.Sprintf("; there is one in the folder that flowctl was started in, but paths are relative to the pipeline file's: write %q", right)
			}
		}
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && info.IsDir():
		why = "it is a folder"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil && info.Mode()&0o111 != 0:
		why = "permission denied, to it or to the interpreter that it names"
	case errors.Is(err, fs.ErrPermission) && fileErr == nil:
		why, kind = "it is not executable (chmod +x)", syscall.ENOEXEC // whoever runs it
	case errors.Is(err, syscall.EAGAIN):
		why = "the limit of processes is reached (ulimit -u, or TasksMax= of a unit)"
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		why = "the limit of open files is reached (ulimit -n, or LimitNOFILE= of a unit)"
	case errors.Is(err, syscall.ENOEXEC):
		why = noProgram
	}
	return &startError{fmt.Sprintf("cannot run %q: %s", program, why), kind}
}

// pathFrom returns how a file that is at path from the folder where flowctl was started is named from dir, "" where
// there is none.
func pathFrom(dir, path string) string {
	if _, err := os.Stat(path); err != nil {
		return ""
	}
	here, err := filepath.Abs(path)
	if err != nil {
		return ""
	}
	right, err := filepath.Rel(dir, here)
	if err == nil && filepath.IsLocal(right) {
		right = "./" + right
	}
	return right
}

// Faults of scripts.
const (
	noProgram = "it is no program of this machine, and has no #! line"
	crlfLine  = `its #! line ends in CRLF, of which the CR counts; remove it from every line: sed -i 's/\r$//'`
)

// programFault says what keeps an executable file from being run, "" for nothing: its #! line
// (execve(2)), that it is a text without one, or that its loader is missing.
func programFault(program string) string {
	f, err := os.OpenFile(program, os.O_RDONLY|syscall.O_NONBLOCK, 0) // to open a FIFO would wait for a writer
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256)
	n, _ := io.ReadFull(f, head) // a shorter file is as good
	line, ok := strings.CutPrefix(string(head[:n]), "#!")
	if !ok && !strings.Contains(line, "\x00") {
		return noProgram
	}
	if !ok {
		return loaderFault(program)
	}
	line, _, _ = strings.Cut(line, "\n")
	words := strings.Fields(line)
	if len(words) == 0 {
		return ""
	}
	if strings.HasSuffix(line, "\r") {
		return crlfLine
	}
	if _, err := os.Stat(words[0]); err != nil {
		return fmt.Sprintf("the interpreter that it names, %q, does not exist", words[0])
	}
	if fault := loaderFault(words[0]); fault != "" {
		return fmt.Sprintf("the interpreter that it names, %q, cannot be run: %s", words[0], fault)
	}
	return ""
}

// loaderFault says that the loader which a program names is missing (elf(5)), of which the kernel
// says only that there is no such file. It returns "" for all else.
func loaderFault(program string) string {
	const most = 4096 // PATH_MAX
	f, err := elf.Open(program)
	if err != nil {
		return ""
	}
	defer f.Close()
	for _, segment := range f.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		path := make([]byte, min(segment.Filesz, most))
		n, _ := segment.ReadAt(path, 0)
		loader, _, _ := strings.Cut(string(path[:n]), "\x00")
		if _, err := os.Stat(loader); errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("its loader, %s, does not exist: it was built for another system or C library", quote(loader))
		}
	}
	return ""
}

// sizeFault says which argument or variable has more bytes than the kernel takes, or that all have
// (execve(2)); "" for none.
func sizeFault(argv, env []string) string {
	const pointer = 8 // bytes, which count for each
	each, all := sizeLimits()
	total := 0
	for i, text := range slices.Concat(argv, env) {
		total += len(text) + 1 + pointer
		if len(text) < each { // a NUL ends it
			continue
		}
		what := fmt.Sprintf("its argument %d", i)
		if i >= len(argv) {
			name, _, _ := strings.Cut(text, "=")
			what = "the variable " + clip(printable(name))
		}
		return fmt.Sprintf("%s has %d bytes, and the kernel takes %d at most of one: hand it over in a file", what, len(text), each-1)
	}
	if total > all {
		return fmt.Sprintf("its arguments and variables have %d bytes in all, and the kernel takes %d (a quarter of ulimit -s)", total, all)
	}
	return ""
}

// sizeLimits returns how many bytes the kernel takes of one argument or variable, and of all.
func sizeLimits() (each, all int) {
	const least = 128 << 10 // MAX_ARG_STRLEN and ARG_MAX of Linux
	if runtime.GOOS == "darwin" {
		return 1 << 20, 1 << 20 // kern.argmax
	}
	var stack syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_STACK, &stack) != nil {
		return least, least
	}
	return least, int(min(max(stack.Cur/4, least), 6<<20))
}
