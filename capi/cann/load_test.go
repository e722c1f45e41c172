// SPDX-License-Identifier: Apache-2.0

package cann

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// parts are what this program does as a child.
var parts = map[string]func(){"load": playLoad, "early": playEarly, "again": playAgain}

// outcome is what a child says of a call.
type outcome struct {
	Code   status.Code
	Text   string
	Loaded string
	Maps   string // the names of what is mapped
}

func tell(err error) {
	o := outcome{Code: status.CodeOf(err), Loaded: Loaded(), Maps: string(must(os.ReadFile("/proc/self/maps")))}
	if err != nil {
		o.Text = err.Error()
	}
	mustNot(json.NewEncoder(os.Stdout).Encode(o))
}

// playLoad loads what the variables say.
func playLoad() {
	UseFace(os.Getenv(faceVariable))
	tell(Load(os.Getenv(folderVariable)))
}

// playEarly calls everything without having loaded anything.
func playEarly() {
	_, err := Devices()
	tell(err)
	_, err = Open(Config{Name: 1, ListenIP: "127.0.0.1"})
	tell(err)
	_, err = NewDevice(0).Reserve(1)
	tell(err)
	tell(NewDevice(0).Copy([]mem.Move{{Dst: 1, Src: 1, Bytes: 1}}, mem.BackingDevice, mem.BackingDevice, 1))
}

// playAgain loads, after it has failed to from a folder without libraries.
func playAgain() {
	folder := os.Getenv(folderVariable)
	UseFace(os.Getenv(faceVariable))
	tell(Load(filepath.Join(folder, "nowhere")))
	tell(Load(folder))
	tell(Load(folder))
}

// heard runs a part in a child and returns what it says.
func heard(t *testing.T, program, part string, settings ...string) (said []outcome) {
	t.Helper()
	out := child(t, program, append(settings, partVariable+"="+part))
	for in := json.NewDecoder(strings.NewReader(out)); in.More(); {
		var o outcome
		require.NoError(t, in.Decode(&o), out)
		said = append(said, o)
	}
	return said
}

func load(t *testing.T, settings ...string) outcome {
	t.Helper()
	said := heard(t, "/proc/self/exe", "load", settings...)
	require.Len(t, said, 1)
	return said[0]
}

// requireNothing wants a process that has gained nothing from a call that has failed.
func requireNothing(t *testing.T, o outcome) {
	t.Helper()
	require.Equal(t, status.FeatureNotEnabled, o.Code, o.Text)
	require.Empty(t, o.Loaded)
	for _, library := range []string{"libstdc++", faceFile, libraryFile} {
		require.NotContains(t, o.Maps, library)
	}
}

func TestLoadWithoutALibraryGainsNothing(t *testing.T) {
	face := faceVariable + "=" + filepath.Join(folder(t), faceFile)

	o := load(t, face)
	requireNothing(t, o)
	require.Contains(t, o.Text, "libllm_datadist.so was not found: by name (LD_LIBRARY_PATH): libllm_datadist.so: cannot open")
	require.Contains(t, o.Text, "; $ASCEND_HOME_PATH is not set; $ASCEND_TOOLKIT_HOME is not set")
	require.Contains(t, o.Text, "set_env.sh")

	home, toolkit := t.TempDir(), t.TempDir()
	o = load(t, face, "ASCEND_HOME_PATH="+home, "ASCEND_TOOLKIT_HOME="+toolkit)
	requireNothing(t, o)
	for _, place := range []string{home, toolkit} {
		require.Contains(t, o.Text, filepath.Join(place, "lib64", libraryFile)+": no such file")
	}

	wrong := t.TempDir()
	o = load(t, face, folderVariable+"="+wrong, "ASCEND_HOME_PATH="+filepath.Dir(lib64(t)))
	requireNothing(t, o)
	require.Contains(t, o.Text, filepath.Join(wrong, libraryFile)+": no such file")
}

// folder is where the stand-in and the face lie that this process has loaded.
func folder(t *testing.T) string {
	t.Helper()
	path, err := built("1")
	require.NoError(t, err)
	return path
}

// lib64 is that folder as a toolkit has it.
func lib64(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lib64")
	require.NoError(t, os.Symlink(folder(t), path))
	return path
}

func TestLoadLooksWhereTheToolkitIs(t *testing.T) {
	face := faceVariable + "=" + filepath.Join(folder(t), faceFile)
	for _, c := range []struct{ place, setting, in string }{
		{"a folder", folderVariable + "=" + folder(t), folder(t)},
		{"the loader's folders", "LD_LIBRARY_PATH=" + folder(t), folder(t)},
		{"home", "ASCEND_HOME_PATH=" + filepath.Dir(lib64(t)), "lib64"},
		{"toolkit", "ASCEND_TOOLKIT_HOME=" + filepath.Dir(lib64(t)), "lib64"},
	} {
		t.Run(c.place, func(t *testing.T) {
			o := load(t, face, c.setting)
			require.Equal(t, status.Success, o.Code, o.Text)
			paths := strings.Split(o.Loaded, " ")
			require.Len(t, paths, 3, o.Loaded)
			for i, file := range []string{libraryFile, "libascendcl.so", "libacl_rt.so"} {
				require.Equal(t, file, filepath.Base(paths[i]))
				require.Contains(t, paths[i], c.in)
			}
		})
	}
}

func TestLoadNamesWhatIsWrongWithTheFace(t *testing.T) {
	library := folderVariable + "=" + folder(t)

	o := load(t, library, faceVariable+"=/nowhere/"+faceFile)
	require.Equal(t, status.FeatureNotEnabled, o.Code)
	require.Contains(t, o.Text, "cannot load the face of the vendor's library: /nowhere/libcann_face.so: cannot open")
	require.NotContains(t, o.Maps, faceFile)

	old := variant(t, faceSources, "exports.map", "cann_*;", "cann_[a-o]*;")
	o = load(t, library, faceVariable+"="+filepath.Join(old, faceFile))
	require.Equal(t, status.FeatureNotEnabled, o.Code)
	require.Contains(t, o.Text, filepath.Join(old, faceFile)+" has no cann_status_name: it is the face of another version")
	require.NotContains(t, o.Maps, faceFile)
}

func TestLoadNamesWhatIsWrongWithTheLibrary(t *testing.T) {
	face := faceVariable + "=" + filepath.Join(folder(t), faceFile)

	const symbol = "_ZN12llm_datadist11LlmDataDist12PullKvBlocks"
	old := variant(t, standinSources, "llm_datadist.map", "    "+symbol, "    other"+symbol)
	o := load(t, face, folderVariable+"="+old)
	require.Equal(t, status.FeatureNotEnabled, o.Code)
	require.Contains(t, o.Text, filepath.Join(old, libraryFile))
	require.Contains(t, o.Text, "has no "+symbol)

	broken := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(broken, libraryFile), []byte("no library"), 0o644))
	o = load(t, face, folderVariable+"="+broken)
	require.Equal(t, status.FeatureNotEnabled, o.Code)
	require.Regexp(t, regexp.QuoteMeta(filepath.Join(broken, libraryFile))+": .*(short|invalid ELF header)", o.Text)
}

// variant builds sources, with one text in one file replaced by another, and returns where.
func variant(t *testing.T, sources, file, text, by string) string {
	t.Helper()
	copied, out := filepath.Join(t.TempDir(), "sources"), t.TempDir()
	require.NoError(t, os.CopyFS(copied, os.DirFS(sources)))
	content, err := os.ReadFile(filepath.Join(copied, file))
	require.NoError(t, err)
	require.Contains(t, string(content), text)
	changed := strings.ReplaceAll(string(content), text, by)
	require.NoError(t, os.WriteFile(filepath.Join(copied, file), []byte(changed), 0o644))
	require.NoError(t, compile(copied, out, "1"))
	return out
}

func TestLoadFindsTheFaceBesideItself(t *testing.T) {
	place := t.TempDir()
	for from, to := range map[string]string{"/proc/self/exe": "program", filepath.Join(folder(t), faceFile): faceFile} {
		content, err := os.ReadFile(from)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(place, to), content, 0o755))
	}
	said := heard(t, filepath.Join(place, "program"), "load", folderVariable+"="+folder(t))
	require.Len(t, said, 1)
	require.Equal(t, status.Success, said[0].Code, said[0].Text)
	require.Contains(t, said[0].Maps, filepath.Join(place, faceFile))
}

func TestLoadAgain(t *testing.T) {
	said := heard(t, "/proc/self/exe", "again", faceVariable+"="+filepath.Join(folder(t), faceFile), folderVariable+"="+folder(t))
	require.Len(t, said, 3)
	requireNothing(t, said[0])
	for _, o := range said[1:] {
		require.Equal(t, status.Success, o.Code, o.Text)
	}

	require.NoError(t, Load(""), "what is there is enough")
	require.Contains(t, Loaded(), libraryFile)
	err := Load(lib64(t))
	require.ErrorIs(t, err, status.FeatureNotEnabled)
	require.ErrorContains(t, err, "loaded already")
}

func TestCallsBeforeLoadAreErrors(t *testing.T) {
	said := heard(t, "/proc/self/exe", "early")
	require.Len(t, said, 4)
	for i, code := range []status.Code{status.FeatureNotEnabled, status.FeatureNotEnabled, status.OutOfMemory, status.FeatureNotEnabled} {
		require.Equal(t, code, said[i].Code, said[i].Text)
		require.Contains(t, said[i].Text, "not loaded yet")
		require.Empty(t, said[i].Loaded)
	}
}
