package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Script is the table of this host as nft commands, one a set, chain, rule and configured element. It holds no window, token or session. Without the table it is empty. It takes root, and nft.
func Script(ctx context.Context) (commands []string, err error) {
	f := New(slog.New(slog.DiscardHandler), 0)
	f.mu.Lock()
	_, there, err := f.tableFlagsLocked()
	f.dropLocked()
	f.mu.Unlock()
	if err != nil || !there {
		return nil, err
	}
	return script(ctx)
}

// PlannedScript is the Script of a host where cfg was applied. It is applied in a network namespace that nothing else is in.
func PlannedScript(ctx context.Context, cfg Config) (commands []string, err error) {
	alone(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("a network namespace to try the table in: %w: run it as root", err)
			return
		}
		f := New(slog.New(slog.DiscardHandler), 0)
		f.plain = true
		if _, err = f.Apply(cfg); err != nil {
			return
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		defer f.dropLocked()
		commands, err = script(ctx)
	})
	return commands, err
}

func script(ctx context.Context) ([]string, error) {
	listing, err := nft(ctx, "-s", "-t", "list", "table", "inet", TableName)
	if err != nil {
		return nil, err
	}
	all := commands(listing)
	for _, name := range configured {
		kind := "set"
		if name == "step" {
			kind = "map"
		}
		listing, err := nft(ctx, "-s", "list", kind, "inet", TableName, name)
		if err != nil {
			return nil, err
		}
		elements := slices.DeleteFunc(commands(listing), func(c string) bool { return !strings.HasPrefix(c, "add element ") })
		slices.Sort(elements)
		all = append(all, elements...)
	}
	slices.SortStableFunc(all, func(a, b string) int { return strings.Compare(place(a), place(b)) })
	return all, nil
}

// place orders commands by what they are about: the order of sets and chains depends on when each was made, and means
// nothing. That of the rules of a chain stays.
func place(command string) string {
	words := strings.Fields(command)
	rank := map[string]string{"set": "0", "map": "0", "chain": "1", "rule": "1", "element": "2"}
	return rank[words[1]] + words[4]
}

func nft(ctx context.Context, args ...string) (string, error) {
	c := exec.CommandContext(ctx, "nft", args...)
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	err := c.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("%w: apt install nftables", err)
	case err != nil:
		return "", fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return out.String(), nil
}

// commands reads a listing of the table, as nft prints it, into commands that would make it.
func commands(listing string) (list []string) {
	object, kind, name, body := "", "", "", []string(nil)
	for line := range strings.Lines(listing) {
		depth := len(line) - len(strings.TrimLeft(line, "\t"))
		text := strings.TrimSpace(line)
		words := strings.Fields(text)
		switch {
		case text == "":
		case depth == 1 && strings.HasSuffix(text, "{"):
			kind, name, body = words[0], words[1], nil
			object = "inet " + TableName + " " + name
		case depth == 1 && text == "}" && kind == "chain":
			if !slices.ContainsFunc(body, func(s string) bool { return strings.HasPrefix(s, "type ") }) {
				list = append(list, "add chain "+object)
			}
			for _, s := range body {
				if strings.HasPrefix(s, "type ") {
					list = append(list, "add chain "+object+" { "+s+" }")
				} else {
					list = append(list, "add rule "+object+" "+s)
				}
			}
		case depth == 1 && text == "}":
			var elements string
			if n := len(body); n > 0 {
				if inner, ok := strings.CutPrefix(body[n-1], "elements = {"); ok {
					elements, body = strings.TrimSuffix(inner, "}"), body[:n-1]
				}
			}
			list = append(list, fmt.Sprintf("add %s %s { %s; }", kind, object, strings.Join(body, "; ")))
			for e := range strings.SplitSeq(elements, ",") {
				if e = strings.TrimSpace(e); e != "" {
					list = append(list, "add element "+object+" { "+e+" }")
				}
			}
		case depth >= 2 && len(body) > 0 && strings.Count(body[len(body)-1], "{") > strings.Count(body[len(body)-1], "}"):
			body[len(body)-1] += " " + text // nft breaks long lists of elements
		case depth >= 2:
			body = append(body, text)
		}
	}
	return list
}
