// SPDX-License-Identifier: Apache-2.0

package cann

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/capi/cann/internal/standin"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

// A process loads one folder only, so a test of another one is this program again. These variables tell it what to take, instead of
// building, and which part to play, instead of the tests.
const (
	faceVariable   = "CANN_TEST_FACE"
	folderVariable = "CANN_TEST_FOLDER"
	partVariable   = "CANN_TEST_PART"
)

// deviceBytes is what the stand-in's devices have, so that what a test has left there is missed at the end.
const deviceBytes = 64 << 20

const (
	faceSources    = "face"
	standinSources = "../../tests/native"
)

// scratch is where this process builds; removed at the end.
var scratch string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if part := os.Getenv(partVariable); part != "" {
		parts[part]()
		return 0
	}
	var err error
	scratch, err = os.MkdirTemp("", "cann-test-")
	mustNot(err)
	defer func() { mustNot(os.RemoveAll(scratch)) }()
	face, folder := os.Getenv(faceVariable), os.Getenv(folderVariable)
	if folder == "" {
		folder = must(built("1"))
		face = filepath.Join(folder, faceFile)
	}
	mustNot(os.Setenv("STANDIN_DEVICE_BYTES", fmt.Sprint(deviceBytes)))
	UseFace(face)
	mustNot(Load(folder))
	mustNot(standin.Find(folder))
	code := m.Run()
	if code == 0 {
		all := must(NewDevice(0).Reserve(deviceBytes)) // fails where anything else is still reserved
		mustNot(all.Close())
	}
	return code
}

// mustNot and must are for where there is no testing.T.
func mustNot(err error) {
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func must[T any](value T, err error) T {
	mustNot(err)
	return value
}

// builds are face and stand-in in one folder, by the C++ string ABI that both are built for.
var builds = map[string]func() (string, error){
	"0": sync.OnceValues(func() (string, error) { return build("0") }),
	"1": sync.OnceValues(func() (string, error) { return build("1") }),
}

func built(abi string) (string, error) { return builds[abi]() }

func build(abi string) (string, error) {
	folder := filepath.Join(scratch, "abi"+abi)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", err
	}
	for _, sources := range []string{faceSources, standinSources} {
		if err := compile(sources, folder, abi); err != nil {
			return "", err
		}
	}
	return folder, nil
}

func compile(sources, folder, abi string) error {
	out, err := exec.Command("make", "-C", sources, "OUT="+folder, "CXX11_ABI="+abi).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make -C %s: %w\n%s", sources, err, out)
	}
	return nil
}

// child is this program again, in an environment without what says where libraries are but for settings, and without this process's.
func child(t *testing.T, program string, settings []string, arguments ...string) string {
	t.Helper()
	cmd := exec.Command(program, arguments...)
	for _, setting := range os.Environ() {
		name, _, _ := strings.Cut(setting, "=")
		switch name {
		case "LD_LIBRARY_PATH", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", faceVariable, folderVariable, partVariable:
		default:
			cmd.Env = append(cmd.Env, setting)
		}
	}
	cmd.Env = append(cmd.Env, settings...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// tidy holds the test to leaving no descriptor behind.
func tidy(t *testing.T) {
	before := testkit.Files(t)
	t.Cleanup(func() { require.ElementsMatch(t, before, testkit.Files(t)) })
}

// planFaults makes the stand-in fail as tests/native/standin.h says.
func planFaults(t *testing.T, faults string) {
	t.Helper()
	require.NoError(t, standin.Plan(faults))
}
