# Completion for bash, by what flowctl itself says: its help, and what runs on this machine.
_flowctl() {
  local program=$1 word=$2 before=$3 command=run words
  COMPREPLY=()
  [[ " ${COMP_WORDS[*]:0:COMP_CWORD} " != *' -- '* ]] || return # another program's words
  ((COMP_CWORD == 1)) || [[ ${COMP_WORDS[1]} == -* ]] || command=${COMP_WORDS[1]}
  # In help a flag that takes a value is followed by one space and the kind of value.
  if [[ $before == -* ]] && "$program" help "$command" 2>/dev/null | grep -q -- "^  $before [^ ]"; then
    [[ $before == -pipeline ]] || return
    command=reload
  fi
  # Only these characters: compgen expands its words, and anyone can register an id.
  case $word:$COMP_CWORD:$command in
    -*) words=$("$program" help "$command" 2>/dev/null | sed -n 's/^  \(-[a-z-]*\).*/\1/p') ;;
    *:1:* | *:help) words=$("$program" help 2>/dev/null | sed -n 's/^  flowctl \([a-z]*\).*/\1/p') ;;
    *:list | *:logs | *:restart)
      words=$("$program" list -wait=false 2>/dev/null |
        awk -v all="$command" '/^ID /{on = 1; next} /\(pid /{on = 0}
          on && $1 ~ /^[A-Za-z0-9._-]+$/ && (all == "list" || $2 != "(not") {print $1}') ;;
    *:reload) words=$("$program" list -wait=false 2>/dev/null | sed -n 's/^\([A-Za-z0-9._-]*\): .*(pid .*/\1/p') ;;
  esac
  COMPREPLY=($(compgen -W "${words-}" -- "$word"))
}
complete -o bashdefault -o default -F _flowctl flowctl
